"""A handle hands events from one thread to a reader in another, or in an event loop."""

import asyncio
import threading

import pytest

from peerlm.serve import Event, Handle

EVENTS = [Event(token_id=1, text="a"), Event(token_id=2, text="b"), Event(finish_reason="length")]


def written(handle: Handle) -> threading.Thread:
    def write() -> None:
        for event in EVENTS:
            handle.put(event)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_a_thread_reads_all_events_in_order() -> None:
    handle = Handle()
    thread = written(handle)
    assert list(handle) == EVENTS
    assert list(handle) == []
    thread.join()


def test_an_event_loop_reads_all_events_in_order() -> None:
    async def read() -> list[Event]:
        handle = Handle()
        reader = asyncio.ensure_future(_all(handle))
        await asyncio.sleep(0)  # the reader waits before anything is written
        thread = written(handle)
        found = await reader
        thread.join()
        return found

    assert asyncio.run(read()) == EVENTS


async def _all(handle: Handle) -> list[Event]:
    return [event async for event in handle]


def test_a_reader_whose_loop_was_closed_cancels_the_request() -> None:
    calls: list[int] = []
    handle = Handle(lambda: calls.append(1))

    async def leave() -> None:
        waiting = asyncio.ensure_future(_all(handle))
        await asyncio.sleep(0)
        handle._waiter = (asyncio.get_running_loop(), asyncio.Event())
        waiter = handle._waiter
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        handle._waiter = waiter  # as if the loop had died without running its tasks to the end

    asyncio.run(leave())
    handle.put(EVENTS[0])
    assert calls == [1]


def test_a_request_is_cancelled_once_and_not_after_its_end() -> None:
    calls: list[int] = []
    handle = Handle(lambda: calls.append(1))
    handle.cancel()
    handle.cancel()
    assert calls == [1]
    ended = Handle(lambda: calls.append(2))
    ended.put(EVENTS[-1])
    ended.cancel()
    assert calls == [1]


def test_nothing_follows_the_last_event() -> None:
    handle = Handle()
    handle.put(EVENTS[-1])
    with pytest.raises(RuntimeError, match="has ended"):
        handle.put(EVENTS[0])
