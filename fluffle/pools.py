"""Where the cells of a sweep run: processes on this machine, or a Dask or Ray cluster.

Each is a context manager that yields how a job is submitted. What was not begun when it ends is never run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from broker.errors import ConfigError
from fluffle.cell import Job, Outcome, Process, run_cell

Submit = Callable[[Job], Future[Outcome]]


@contextmanager
def on_this_machine(jobs: int) -> Iterator[Submit]:
    """At most so many cells at a time. Those that still run when it ends are told to."""
    processes: list[Process] = []
    leaving = threading.Event()

    def began(process: Process) -> None:
        processes.append(process)
        if leaving.is_set():
            _end(process)

    executor = ThreadPoolExecutor(jobs, thread_name_prefix="cell")
    try:
        yield lambda job: executor.submit(run_cell, job, began)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        leaving.set()
        for process in processes:
            _end(process)
        executor.shutdown(wait=True)


def _end(process: Process) -> None:
    if process.stdin:
        process.stdin.close()  # one that has ended does not mind


@contextmanager
def one_by_one(unfinished: Path) -> Iterator[Submit]:
    """For cells that share a federation on a broker, which is in one run at a time.

    The file `unfinished` names the run that the broker may still be in, after a cell that failed or was killed: the
    next one gives it up.
    """
    with on_this_machine(1) as submit, ThreadPoolExecutor(1, thread_name_prefix="turn") as turns:

        def take(job: Job) -> Outcome:
            before = unfinished.read_text() if unfinished.exists() else ""
            unfinished.write_text(job.run_id)
            outcome = submit(replace(job, abandon=before)).result()
            if not outcome.error:
                unfinished.unlink()
            return outcome

        yield lambda job: turns.submit(take, job)


@contextmanager
def on_dask(address: str) -> Iterator[Submit]:
    """As many cells as the cluster has threads; its workers need Fluffle. Raises ConfigError."""
    try:
        distributed: Any = import_module("distributed")
    except ImportError:
        raise ConfigError("--dask needs the package distributed: pip install 'fluffle[dask]'") from None
    try:
        client = distributed.Client(address, timeout=30)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dask {address}: no Dask scheduler answers there: {error}") from None
    with client, client.get_executor(pure=False) as executor:
        yield lambda job: executor.submit(run_cell, job)


@contextmanager
def on_ray(address: str) -> Iterator[Submit]:
    """As many cells as the cluster has processors; its workers need Fluffle. Raises ConfigError."""
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise ConfigError("--ray needs the package ray: pip install 'fluffle[ray]'") from None
    try:
        ray.init(address=address)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray {address}: no Ray cluster answers there: {error}") from None
    remote = ray.remote(run_cell)
    try:
        yield lambda job: remote.remote(job).future()
    finally:
        ray.shutdown()
