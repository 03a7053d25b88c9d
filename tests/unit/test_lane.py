"""A lane of work: one piece of work after the other, results in their order, errors where they belong."""

from __future__ import annotations

import asyncio
import threading

import pytest

from workers.lane import Lane


async def test_work_is_done_one_after_the_other_in_a_thread_of_its_own() -> None:
    thread, running, order = Lane("train"), [0], list[int]()

    def work(number: int) -> str:
        running[0] += 1
        assert running == [1], "never two at once"
        order.append(number)
        running[0] -= 1
        return threading.current_thread().name

    names = await asyncio.gather(*(thread.run(lambda n=number: work(n)) for number in range(200)))
    assert order == list(range(200))
    assert set(names) == {"train_0"}
    await asyncio.to_thread(thread.shutdown)


async def test_errors_are_raised_where_they_are_awaited() -> None:
    thread = Lane("train")

    def fail() -> None:
        raise ValueError("this one")

    good, bad, also = await asyncio.gather(
        thread.run(lambda: 1), thread.run(fail), thread.run(lambda: 2), return_exceptions=True
    )
    assert (good, str(bad), also) == (1, "this one", 2)
    await asyncio.to_thread(thread.shutdown)


async def test_quick_work_is_told_while_slow_work_waits_behind_it() -> None:
    thread, gate = Lane("train"), threading.Event()
    quick = asyncio.create_task(thread.run(lambda: 1))
    slow = asyncio.create_task(thread.run(gate.wait))
    await asyncio.wait_for(quick, 5)
    assert not slow.done()
    gate.set()
    assert await slow
    await asyncio.to_thread(thread.shutdown)


async def test_what_was_cancelled_before_it_began_is_not_done() -> None:
    thread, gate, done = Lane("train"), threading.Event(), list[int]()
    first = asyncio.create_task(thread.run(gate.wait))
    second = asyncio.create_task(thread.run(lambda: done.append(2)))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.set()
    await first
    assert await thread.run(lambda: done) == []
    await asyncio.to_thread(thread.shutdown)
