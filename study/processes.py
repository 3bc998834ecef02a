"""Fresh processes that need not import what all of them import."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess

TERMINATED = 128 + signal.SIGTERM


def preload(modules: Sequence[str], jobs: int) -> None:
    """Starts the server that all processes are forked from; it imports in the background and touches no GPU.

    Args:
        modules: What it imports.
        jobs: Processes side by side, which share the cores.
    """
    get_context("forkserver").set_forkserver_preload(list(modules))
    # Threads are counted when torch is imported, which is there; whoever gives a number keeps it. Python 3.11's server
    # finds modules by the environment alone.
    with environment(OMP_NUM_THREADS=str(threads(jobs)), PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()


def threads(jobs: int) -> int:
    """Threads of each of so many processes side by side."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // jobs))


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables, inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def start(call: Callable[..., object], *args: object) -> ForkServerProcess:
    """``call`` in a process of its own, which may have children."""
    process = get_context("forkserver").Process(target=call, args=args)
    process.start()
    return process


def first_to_end(processes: Sequence[ForkServerProcess], seconds: float | None = None) -> list[ForkServerProcess]:
    """Waits until one has ended, or so long."""
    ready = wait([process.sentinel for process in processes], seconds)
    ended = [process for process in processes if process.sentinel in ready]
    for process in ended:
        process.join()
    return ended


@contextmanager
def none_left_behind() -> Iterator[list[ForkServerProcess]]:
    """Whatever happens inside, SIGTERM and Ctrl-C included, the processes that are put into the list end with it."""
    running: list[ForkServerProcess] = []

    def leave(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = None
    with suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, leave)
    try:
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.join()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
