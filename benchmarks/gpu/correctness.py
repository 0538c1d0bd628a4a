"""Whether our operators are right on this card; each check is one row."""

import mixing_checks
import retrieval_checks
import row_checks
from report import Report

BACKENDS = ("triton", "reference")
"""What is checked; the definition too, which shows that the checks hold."""


def run(report: Report) -> None:
    """All checks."""
    for backend in BACKENDS:
        retrieval_checks.run(report, backend)
        mixing_checks.run(report, backend)
    row_checks.run(report)


def run_triton(report: Report) -> None:
    """Those of our kernels alone, the shortest first."""
    mixing_checks.run(report, "triton")
    row_checks.run(report)
    retrieval_checks.run(report, "triton")
