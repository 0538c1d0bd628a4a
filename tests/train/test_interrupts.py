"""Signals: the first is noted, the second acts."""

import signal
import threading

import pytest

from peerlm.train.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_acts_as_before(number: signal.Signals) -> None:
    arrived = []
    former = signal.signal(number, lambda *_: arrived.append(number))
    try:
        with Interrupts() as interrupts:
            assert interrupts.received is None
            signal.raise_signal(number)
            assert (interrupts.received, arrived) == (number, [])
            signal.raise_signal(number)
            assert arrived == [number]
    finally:
        signal.signal(number, former)


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
