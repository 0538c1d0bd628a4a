"""Commands as processes: told to stop, all end, and what was stopped can be continued."""

import os
import signal

import pytest

from peerlm.errors import TrainingStopped
from peerlm_studies.processes import Processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_its_exit_code_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with (
        pytest.raises(TrainingStopped, match=f"stopped by {number.name}; finished runs are kept") as stop,
        Processes(jobs=1, shown=False),
    ):
        os.kill(os.getpid(), number)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
