"""The virtual clock: it jumps over waits, never while anything is done, and leaves no order to chance."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.errors import StateError
from fluffle.virtual import AtOnce, VirtualLoop
from workers.lane import Lane

WEEK_S = 7 * 86400.0


def run(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_week_passes_at_once_and_exactly() -> None:
    async def main() -> float:
        assert now() == 0
        await asyncio.sleep(WEEK_S)
        return now()

    began = time.monotonic()
    assert run(main()) == WEEK_S
    assert time.monotonic() - began < 5


@example([1.0, 1.0004])
@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=20))
def test_sleepers_wake_in_their_order_at_their_times(waits: list[float]) -> None:
    woken: list[tuple[float, float]] = []

    async def sleeper(wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        woken.append((wait_s, now()))

    async def main() -> None:
        await asyncio.gather(*map(sleeper, waits))

    run(main())
    assert [wait_s for wait_s, _ in woken] == pytest.approx(sorted(waits), abs=2e-9)
    assert [at for _, at in woken] == pytest.approx([wait_s for wait_s, _ in woken], abs=2e-9)


def test_it_stands_still_while_a_thread_works() -> None:
    lane = Lane("train", AtOnce("train"))

    async def main() -> list[float]:
        timer = asyncio.create_task(asyncio.sleep(0.001))
        times = []
        for work in (
            lambda: asyncio.to_thread(time.sleep, 0.02),
            lambda: lane.run(lambda: time.sleep(0.02)),
            lambda: asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.02),
        ):
            await work()
            times.append(now())
        await timer
        return [*times, now()]

    assert run(main()) == [0, 0, 0, 0.001]
    lane.shutdown()


def test_what_threads_hand_back_comes_in_the_order_in_which_it_was_asked_for() -> None:
    """Though the first work takes longest, and whoever asked first also waits for a timer at the same time."""
    found: list[int] = []

    async def ask(number: int, lane: Lane) -> None:
        await asyncio.sleep(1.0)
        await (lane.run if number % 2 else asyncio.to_thread)(lambda: time.sleep(0.02 / (1 + number)))
        found.append(number)

    async def main() -> None:
        lane = Lane("train", AtOnce("train"))
        await asyncio.gather(*(ask(number, lane) for number in range(8)))
        assert now() == 1.0
        await asyncio.to_thread(lane.shutdown)

    run(main())
    first, found = found, []
    for _ in range(3):
        found = []
        run(main())
        assert found == first


def test_an_executor_of_somebodys_own_is_not_used() -> None:
    async def main() -> str:
        return await asyncio.get_running_loop().run_in_executor(None, lambda: threading.current_thread().name)

    assert run(main()).startswith("virtual")


def test_errors_cross_from_threads() -> None:
    async def main() -> None:
        await asyncio.to_thread(lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        run(main())


def test_deadlines_pass_and_cancelled_timers_do_not_hold_time_up() -> None:
    async def main() -> float:
        long = asyncio.create_task(asyncio.sleep(WEEK_S))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 60)
        assert now() == 60
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await long
        assert long.cancelled()
        await asyncio.sleep(1)
        return now()

    assert run(main()) == 91


def test_what_is_ready_comes_before_any_jump() -> None:
    async def main() -> tuple[int, float]:
        timer, steps = asyncio.create_task(asyncio.sleep(1e-3)), 0
        for _ in range(1000):
            await asyncio.sleep(0)
            steps += 1
        before = now()
        await timer
        return steps, before

    assert run(main()) == (1000, 0.0)


def test_when_nothing_can_ever_happen_it_says_so() -> None:
    async def main() -> None:
        await asyncio.sleep(3)
        await asyncio.Event().wait()

    with pytest.raises(StateError, match="stands still at 3 s"):
        run(main())


def test_equal_programs_do_the_same_at_equal_times() -> None:
    def history() -> list[tuple[float, int]]:
        told: list[tuple[float, int]] = []
        dice = random.Random(7)

        async def one(number: int) -> None:
            for _ in range(20):
                await asyncio.sleep(dice.choice((0, 0.5, 1, 1)))  # many at the same time
                if dice.random() < 0.3:
                    await asyncio.to_thread(sum, range(dice.randrange(20_000)))
                told.append((now(), number))

        async def main() -> None:
            await asyncio.gather(*map(one, range(10)))

        run(main())
        return told

    assert history() == history()
