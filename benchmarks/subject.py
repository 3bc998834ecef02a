"""One method of several that share one set of dense weights: what it answers, how long that takes, and what it keeps.

Shape suffixes: B batch, T tokens of the prompt, L decoder layers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from lit_modules import FromConfig
from routing import KeptTokens, RoutingPlugin, RoutingRecord, RoutingTape, TokenKind, Tokens, attach
from routing.cost import Convention, DecoderShape, count
from routing.names import decoder_layers
from routing.stored import stored

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VALUE = 2  # bytes of a bf16 number


@dataclass(frozen=True)
class Prompt:
    """Random tokens to read, and random ones to go on with, the same for every method.

    Args:
        tokens: Facts about those to read.
        ids_BT: The tokens to read.
        answers: Those to go on with, (B, 1) each.
    """

    tokens: Tokens
    ids_BT: Tensor
    answers: tuple[Tensor, ...]

    @classmethod
    def of(cls, rows: int, vision: int, text: int, steps: int, vocabulary: int) -> Prompt:
        """``text`` / 2 tokens of a system prompt, ``vision`` image tokens, the rest a question; all rows differ."""
        before, after = text // 2, text - text // 2
        kinds = [TokenKind.SYSTEM] * before + [TokenKind.VISION] * vision + [TokenKind.QUESTION] * after
        ids = torch.randint(1, vocabulary, (rows, len(kinds) + steps), generator=torch.Generator().manual_seed(0))
        ids_BT, answers_BT = ids[:, : len(kinds)], ids[:, len(kinds) :]
        answers = tuple(each.contiguous().to(DEVICE) for each in answers_BT.split(1, dim=1))
        tokens = Tokens.of(torch.tensor([kinds] * rows), phase="prefill").to(DEVICE)
        return cls(tokens, ids_BT.contiguous().to(DEVICE), answers)


@dataclass(frozen=True)
class Entered:
    """Who entered the layers in one forward, or in several that were added up.

    Args:
        tokens_LB: Tokens that entered, routed or not.
        chosen_L: Candidates that entered, over all rows.
        candidates_L: Tokens that a rule decided on; 0 where none was asked.
    """

    tokens_LB: Tensor
    chosen_L: Tensor
    candidates_L: Tensor

    @classmethod
    def of(cls, records: list[RoutingRecord], layers: int, rows: int, tokens: int) -> Entered:
        """Of one forward of ``tokens`` tokens a row; a layer without a record took all of them."""
        tokens_LB = torch.full((layers, rows), tokens, device=DEVICE)
        chosen_L, candidates_L = (torch.zeros(layers, dtype=torch.long, device=DEVICE) for _ in range(2))
        for record in records:
            assert isinstance(record.decision, KeptTokens)
            keep_BT = record.decision.keep_BT()
            tokens_LB[record.site.layer] = keep_BT.sum(1)
            chosen_L[record.site.layer] = (keep_BT & record.candidate_BT).sum()
            candidates_L[record.site.layer] = record.candidate_BT.sum()
        return cls(tokens_LB.cpu(), chosen_L.cpu(), candidates_L.cpu())

    def __add__(self, other: Entered) -> Entered:
        return Entered(
            self.tokens_LB + other.tokens_LB, self.chosen_L + other.chosen_L, self.candidates_L + other.candidates_L
        )

    def share(self) -> float | None:
        """Of the candidates of all layers; None if there were none."""
        return None if not self.candidates_L.any() else int(self.chosen_L.sum()) / int(self.candidates_L.sum())

    def shares(self) -> list[float]:
        """The same, layer by layer, where there were any."""
        asked_L = self.candidates_L > 0
        shares: list[float] = (self.chosen_L[asked_L] / self.candidates_L[asked_L]).tolist()
        return shares


@dataclass(frozen=True)
class Held:
    """Bytes of the keys and values in a cache.

    Args:
        measured: Those of all slots.
        used: Those of slots that hold a token.
        counted: As many as were expected.
    """

    measured: int
    used: int
    counted: int


@dataclass
class Timing:
    """One method in one setting: milliseconds by turn, and what does not vary."""

    prompt: Entered
    answers: Entered
    held: tuple[Held, Held]  # after the prompt, and after all steps
    flops: int  # of the prompt
    token_bytes: float  # that one step has to read: the weights of layers that anyone enters, and the cache there
    peak: int | None
    prefill_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)


class Subject:
    """A model, dense or routed, and the answer that it is at.

    Args:
        base: The dense model, whose parameters it shares.
        plugins: What routes it.
    """

    def __init__(self, base: PreTrainedModel, plugins: Mapping[str, RoutingPlugin]) -> None:
        self.model = twin(base)
        self.tape: RoutingTape = attach(self.model, plugins)
        self.layers = decoder_layers(self.model)
        self.sizes_L = torch.tensor([sum(p.nbytes for p in layer.parameters()) for layer in self.layers])
        torch.manual_seed(1)
        for linear in self.routers():
            nn.init.normal_(linear.weight, std=0.02)

    def routers(self) -> Iterator[nn.Linear]:
        """The linear maps of its routers."""
        root = getattr(self.model, "routers", nn.Module())
        yield from (module for module in root.modules() if isinstance(module, nn.Linear))

    def prefill(self, prompt: Prompt) -> float:
        """Reads a prompt into a new cache; milliseconds."""
        cache = DynamicCache(config=self.model.config)
        return milliseconds(lambda: self.read(prompt, cache))

    def decode(self, prompt: Prompt, steps: int) -> float:
        """Goes on for some steps; milliseconds per token."""
        return milliseconds(lambda: [self._step(prompt) for _ in range(steps)]) / steps

    def forget(self) -> None:
        """Gives the cache up."""
        del self.cache

    def read(self, prompt: Prompt, cache: Cache) -> None:
        """Reads a prompt into an empty cache, and goes on from there."""
        self.cache, self.at = cache, 0
        with self.tape.about(prompt.tokens):
            self._read(prompt.ids_BT)

    def _step(self, prompt: Prompt) -> None:
        self._read(prompt.answers[self.at])
        self.at += 1

    def _read(self, ids_BT: Tensor) -> None:
        output = self.model(input_ids=ids_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        output.logits.argmax(-1)  # what a greedy answer would be; the next token is given

    def observe(self, prompt: Prompt) -> Timing:
        """What does not vary: who enters, bytes and memory as they are and as they are counted."""
        before = memory("current")
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        read = self._recorded(lambda: self.prefill(prompt), prompt.ids_BT)
        total, needed, steps = read, 0, len(prompt.answers)
        first = self._held(prompt.tokens, total)
        for ids_B1 in prompt.answers:
            step = self._recorded(lambda: self._step(prompt), ids_B1)
            total += step
            needed += self._bytes_read(step, total)
        last = self._held(prompt.tokens.extended(steps), total)
        answers = Entered(
            total.tokens_LB - read.tokens_LB, total.chosen_L - read.chosen_L, total.candidates_L - read.candidates_L
        )
        peak = memory("peak")
        self.forget()
        taken = None if peak is None or before is None else peak - before
        return Timing(read, answers, (first, last), self._flops(read), needed / steps, taken)

    def _recorded(self, act: Callable[[], object], ids_BT: Tensor) -> Entered:
        with self.tape.recording() as records:
            act()
        return Entered.of(records, len(self.layers), *ids_BT.shape)

    def _held(self, tokens: Tokens, entered: Entered) -> Held:
        """Counted beforehand where the rules have a bound, and from the records where only the data tell."""
        layers = stored(self.cache)
        try:
            counted = count(self.model, tokens).kv_bytes
        except ValueError:
            counted = int(entered.tokens_LB.sum()) * self._token_bytes()
        return Held(sum(layer.bytes for layer in layers), sum(layer.used_bytes for layer in layers), counted)

    def _token_bytes(self) -> int:
        """Bytes of the keys and values of one token in one layer."""
        shape = DecoderShape.of(self.model)
        return 2 * shape.kv_heads * shape.head_dim * VALUE

    def _bytes_read(self, step: Entered, total: Entered) -> int:
        """The least that a step reads: a layer that no row enters needs neither weights nor keys."""
        entering_LB = step.tokens_LB > 0
        weights = int(self.sizes_L[entering_LB.any(1)].sum())
        keys = int(total.tokens_LB[entering_LB].sum()) * self._token_bytes()
        return weights + keys + sum(p.nbytes for p in self.model.get_output_embeddings().parameters())

    def _flops(self, entered: Entered) -> int:
        """Of a prompt, without those of the routers themselves."""
        shape, convention = DecoderShape.of(self.model), Convention()
        numbers = entered.tokens_LB.flatten().tolist()
        layers = sum(shape.layer_flops(n, convention, n * shape.feed_forward) for n in numbers)
        return layers + 2 * shape.width * shape.vocabulary * entered.tokens_LB.shape[1]


def dense_model(shape: str) -> PreTrainedModel:
    """A model of that shape with random bf16 weights on the device.

    Input norms are drawn about 1 with deviation 1, layer by layer: with norms of 1, as they start, a router that all
    layers share would let a token that passed one layer by pass by all those that follow.
    """
    torch.manual_seed(0)
    with DEVICE:
        model: PreTrainedModel = FromConfig(shape, dtype="bfloat16").build().eval()
    for layer in decoder_layers(model):
        nn.init.normal_(layer.input_layernorm.weight, mean=1.0)
    return model


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own objects over the very same parameters and buffers."""
    made: PreTrainedModel = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
    return made


def milliseconds(act: Callable[[], object]) -> float:
    """From an idle device to an idle device."""
    wait()
    began = time.perf_counter()
    act()
    wait()
    return (time.perf_counter() - began) * 1e3


def wait() -> None:
    """Until the device is idle."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def memory(which: str) -> int | None:
    """Bytes asked for, without what the allocator rounds them up by; None where nobody counts."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"] if DEVICE.type == "cuda" else None


def bytes_per_ms() -> float:
    """Memory bandwidth of large copies, bytes read and written."""
    source = torch.randn(2**30 if DEVICE.type == "cuda" else 2**22, device=DEVICE)
    target, copies = torch.empty_like(source), 10
    target.copy_(source)
    return 2 * copies * source.nbytes / milliseconds(lambda: [target.copy_(source) for _ in range(copies)])
