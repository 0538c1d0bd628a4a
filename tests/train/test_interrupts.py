"""Signals: the first is noted, and what is saved then is left alone by later ones."""

import signal
import threading

import pytest

from peerlm.train.interrupts import Interrupts


@pytest.mark.parametrize(
    ("first", "second", "world_size", "acts"),
    [
        (signal.SIGTERM, signal.SIGTERM, 1, False),
        (signal.SIGINT, signal.SIGTERM, 1, False),
        (signal.SIGINT, signal.SIGINT, 1, True),
        (signal.SIGTERM, signal.SIGINT, 1, True),
        (signal.SIGINT, signal.SIGINT, 2, False),
        (signal.SIGTERM, signal.SIGTERM, 2, False),
    ],
)
def test_the_first_signal_is_noted_and_later_ones_leave_the_save_alone(
    monkeypatch: pytest.MonkeyPatch,
    first: signal.Signals,
    second: signal.Signals,
    world_size: int,
    acts: bool,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    arrived = []
    former = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in Interrupts.SIGNALS}
    try:
        with Interrupts() as interrupts:
            assert interrupts.received is None
            signal.raise_signal(first)
            assert (interrupts.received, arrived) == (first, [])
            signal.raise_signal(second)
            assert interrupts.received == first
            assert arrived == [second] * acts
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in Interrupts.SIGNALS]
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in Interrupts.SIGNALS] == before


def test_another_thread_holds_nothing_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with Interrupts() as interrupts:
            seen.append((interrupts.received, signal.getsignal(signal.SIGTERM) == before))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, True)]
