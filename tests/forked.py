"""Commands in processes of their own that need not import anything again."""

import multiprocessing
import os
import socket

import torch

import lit

# A forked process cannot use CUDA once its parent has asked for it.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


def start(args: list[str], env: dict[str, str] | None = None):
    """``python -m lit`` with these arguments."""
    child = CONTEXT.Process(target=_main, args=(args, env or {}))
    child.start()
    return child


def ranks(args: list[str], world: int = 2, timeout: float = 150) -> list[int]:
    """The exit codes of as many processes as ``torchrun`` would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    shared |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [start(args, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
    for child in children:
        child.join(timeout)
    for child in children:
        if child.is_alive():
            child.kill()
    return [child.exitcode for child in children]


def _main(args: list[str], env: dict[str, str]) -> None:
    os.environ.update(env)
    lit.main(args)
