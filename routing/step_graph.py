"""What is asked about single tokens, as one CUDA graph: a step of decoding waits for Python, and not for the device.

Shape suffixes: B batch, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

Answer = TypeVar("Answer")
WARM = 3  # calls before one is captured: a short answer pays for none, and libraries have made their workspaces
_SIDE: dict[torch.device, torch.cuda.Stream] = {}  # one for all, since each stream has a workspace of its own


def is_pure(part: object) -> bool:
    """Whether a router or a rule says, of its very class or of itself, that it may be replayed."""
    own: dict[str, object] = getattr(part, "__dict__", {})
    return bool(own.get("pure", vars(type(part)).get("pure", False)))


class StepGraph(Generic[Answer]):
    """Captures a function of single tokens once it was asked the same way a few times, and replays it from then on.

    A replay runs the same kernels on the same memory: what it answers stands there until it is asked again. So the
    function must take everything from its argument and from tensors that stay where they are, and ask the device
    nothing. Where its modules hold other tensors or other modules than they did, it is captured anew; where one has a
    hook, it is called as ever.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._modules: Sequence[nn.Module] = ()
        self._calls = 0
        self._captured: tuple[torch.cuda.CUDAGraph, Tensor, Answer] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> StepGraph[Answer]:
        return StepGraph()  # a copy of a model has other weights, and captures for itself

    def __reduce__(self) -> tuple[type[StepGraph[Answer]], tuple[()]]:
        return StepGraph, ()

    def __call__(
        self, ask: Callable[[Tensor], Answer], x_B1D: Tensor, called: Iterable[nn.Module], facts: object
    ) -> tuple[Answer, bool]:
        """What ``ask(x_B1D)`` is, and whether that was replayed.

        Args:
            ask: The function.
            x_B1D: Hidden states of one token of each row.
            called: Modules that it calls.
            facts: What else it depends on, compared by ``==``.

        Raises:
            RuntimeError: the function asks the device for a number.
        """
        if not _may_replay(x_B1D):
            return ask(x_B1D), False
        state = _state(self._modules)
        if self._key != (facts, x_B1D.shape, x_B1D.dtype, x_B1D.device, state):
            self._modules = [part for module in called for part in module.modules()]
            state = _state(self._modules)
            self._key = (facts, x_B1D.shape, x_B1D.dtype, x_B1D.device, state)
            self._calls, self._captured = 0, None
        self._calls += 1
        if state is None or self._calls <= WARM:
            return ask(x_B1D), False
        if self._captured is None:
            self._captured = _captured(ask, x_B1D)
        graph, given_B1D, answer = self._captured
        given_B1D.copy_(x_B1D)
        graph.replay()
        return answer, True


def _may_replay(x: Tensor) -> bool:
    """Whether a call that was made before says what a call would do now."""
    return (
        x.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cuda")
        and not torch.cuda.is_current_stream_capturing()
        and not everywhere._global_forward_hooks
        and not everywhere._global_forward_pre_hooks
    )


def _state(modules: Iterable[nn.Module]) -> list[object] | None:
    """Where their tensors lie, and which modules they call; None where a call does more than its class says."""
    state: list[object] = []
    for module in modules:
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or own.get("_compiled_call_impl"):
            return None
        state += (type(module), module.training, *own["_modules"].values())
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):  # sharded, or quantized
                return None
            state.append(tensor if tensor is None else tensor.data_ptr())
    return state


def _captured(ask: Callable[[Tensor], Answer], x_B1D: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Answer]:
    """The graph, what it is given, and what it answers."""
    # Not `torch.cuda.graph`, which collects all garbage first: in every layer that would take a second.
    graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream(x_B1D.device)
    if x_B1D.device not in _SIDE:
        _SIDE[x_B1D.device] = torch.cuda.Stream(x_B1D.device)  # type: ignore[no-untyped-call]
    side, given_B1D = _SIDE[x_B1D.device], x_B1D.clone()
    side.wait_stream(now)
    with torch.cuda.stream(side):
        _check_asks_nothing(ask, given_B1D)
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            answer = ask(given_B1D)
        finally:
            graph.capture_end()
    now.wait_stream(side)
    return graph, given_B1D, answer


def _check_asks_nothing(ask: Callable[[Tensor], object], x_B1D: Tensor) -> None:
    """Raises RuntimeError where the host waits for the device, before that breaks a capture and PyTorch's chance."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        ask(x_B1D)
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise RuntimeError(
            "A router, a weighting or a rule that is declared pure asks the device for a number, in a step of decoding,"
            " and a CUDA graph cannot hold that.\nAllowed: work on the device alone.\nWrite it so, or declare it"
            " `pure = False`."
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
