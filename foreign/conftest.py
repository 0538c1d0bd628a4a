"""Which foreign tests may fail, and the summary: passed, failed, excepted and skipped, with reasons."""

import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXCEPTIONS: list[dict[str, Any]] = tomllib.loads(
    (Path(__file__).parent / "exceptions.toml").read_text(encoding="utf-8")
)["exception"]
NEEDS_THE_HUB = re.compile(
    r"OfflineModeIsEnabled|LocalEntryNotFoundError|Cannot (reach|find) .*offline|couldn't connect to"
    r"|is not a local folder and is not a valid model identifier|We couldn't (connect|find)"
)
_stale: list[str] = []
_of_test: dict[str, dict[str, Any]] = {}
_failed: set[str] = set()
"""Exceptions that failed, as they should."""


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """What the tests draw is the same in each run."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "tests.test_modeling_common" in sys.modules:
        sys.modules["tests.test_modeling_common"].global_rng.seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the exceptions; those that no test matches are stale."""
    suites = {item.path.stem for item in items}
    for exception in EXCEPTIONS:
        found = [
            item
            for item in items
            if item.path.stem == exception["suite"]
            and any(fnmatchcase(item.nodeid.partition("::")[2], pattern) for pattern in exception["tests"])
        ]
        if not found and exception["suite"] in suites and _whole_suite(config) and not exception.get("checkout"):
            _stale.append(f"no test matches {exception['tests']} ({exception['reason']})")
        for item in found:
            _of_test[item.nodeid] = exception
            if exception["outcome"] == "skip":
                item.add_marker(pytest.mark.skip(reason=exception["reason"]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """The failure of an exception is an expected one; a test that asks for a model of the hub is skipped."""
    report = yield
    if report.outcome != "failed" or call.excinfo is None:
        return report
    exception = _of_test.get(item.nodeid)
    if exception is not None:
        _failed.add(item.nodeid)
        report.outcome, report.wasxfail = "skipped", exception["reason"]
    elif NEEDS_THE_HUB.search(f"{call.excinfo.typename}: {call.excinfo.value}"):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, "Skipped: needs a model of the hub")
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """An exception that is not needed any more is stale, and fails the run."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = {report.nodeid for report in reporter.stats.get("skipped", [])}
    for exception in EXCEPTIONS:
        tests = {test for test, each in _of_test.items() if each is exception} - skipped
        passed = tests - _failed
        if exception["outcome"] == "fails" and passed:
            _stale.append(f"{', '.join(sorted(passed))} did not fail ({exception['reason']})")
        if exception["outcome"] == "may fail" and tests == passed and tests and _whole_suite(session.config):
            _stale.append(f"none of {exception['tests']} fails ({exception['reason']})")
    if _stale and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Counts, each exception's and each skip's reason once."""
    stats, line = terminalreporter.stats, terminalreporter.write_line
    line("")
    for outcome in ("passed", "failed", "error", "xfailed", "skipped"):
        line(f"{len(stats.get(outcome, [])):5} {'excepted' if outcome == 'xfailed' else outcome}")
    for outcome, title in (("xfailed", "excepted"), ("skipped", "skipped")):
        reasons = Counter(_reason(report, outcome) for report in stats.get(outcome, []))
        for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
            line(f"{title} {count:4}: {reason}")
    for text in _stale:
        line(f"STALE: {text}; remove it from exceptions.toml")


def _whole_suite(config: pytest.Config) -> bool:
    return not (config.option.keyword or config.option.deselect or any("::" in each for each in config.args))


def _reason(report: pytest.TestReport, outcome: str) -> str:
    if outcome == "xfailed":
        return str(report.wasxfail)
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    text = text.removeprefix("Skipped: ")
    return re.sub(r"^\S+ is skipped: `[\w-]+` is not in .*", "a pipeline that is not a language model's", text)[:110]
