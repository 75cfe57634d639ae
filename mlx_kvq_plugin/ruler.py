"""The ruler: what schemes cost on a model, all measured in one way.

Texts of equal length are the rows of one batch. After a prefill every token is a step of its own through the real
compressed cache, and the same step runs through mlx-lm's caches on the same weights: both at once, so that log
probabilities `(B, V)` are reduced to scalars and forgotten. Reference and schemes share one routed model, which sends
mlx-lm's caches to mlx-lm's own attention.

Where the model allows it several schemes and the reference are rows of one forward (lockstep.py). Schemes that lose
nothing always run alone, as the reference beside them does: fp16 against fp16 is exactly 0 in every distance.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .config import FP16
from .contenders import AFFINE_SCHEMES, Contender, affine_bits, make_contender
from .errors import KVQError
from .evaluation import Scores, agreement, divergence, logprobs
from .layouts import CHUNK
from .loading import compress
from .lockstep import can_join, joint_chunk, joint_logits, lockstep, lockstep_modules
from .needle import Haystack, Retrieval, retrieve
from .progress import Progress, silent
from .report import cache_report
from .results import SchemeResult, TextResult
from .routing import Globals
from .schemes import list_schemes, parse_scheme

ROUTES = "identity,sinks=0,recent=0"  # compresses every layer that any scheme does, so that all of them are routed
TOGETHER = 8  # schemes whose caches are held at a time; the reference runs once for each so many


def check_scheme(name: str) -> None:
    """Raise `SchemeError` for a name that the ruler does not know."""
    if affine_bits(name) is None:
        parse_scheme(name)


def all_schemes(head_dim: int) -> list[str]:
    """Every named scheme and every one of a single codec, without those that lose nothing, and mlx-lm's caches."""
    lossy = [row.name for row in list_schemes(head_dim) if row.bits is None or not _lossless(row.name)]
    return [*lossy, *AFFINE_SCHEMES]


def _lossless(name: str) -> bool:
    spec = parse_scheme(name).layer_spec()
    return name == FP16 or spec.key == spec.value == "identity"


def head_dim(model: Any, unknown_arch: str = "error") -> int:
    """The head size of the model's first layer with keys and values."""
    with compress(model, FP16, unknown_arch=unknown_arch) as compression:
        return next(plan.geometry.key_dim for plan in compression.maker.plan() if plan.geometry.kv_heads)


def measure(
    model: Any,
    texts: Mapping[str, Sequence[int]],
    schemes: Sequence[str],
    *,
    prefill: int = 200,
    steps: int = 200,
    haystack: Haystack | None = None,
    unknown_arch: str = "error",
    source: str = "",
    joint: bool = True,
    progress: Progress = silent,
) -> Iterator[SchemeResult]:
    """Measure schemes against mlx-lm's caches, in their order; results come in groups of `TOGETHER`.

    Args:
        model: from mlx-lm, not compressed; it is as before whenever a result is handed out.
        texts: tokens by name, of which the first `prefill + steps` are fed.
        schemes: scheme strings and `mlx-affine8` to `mlx-affine2`; one that the model cannot do gives an error row.
        prefill: tokens fed at first, in chunks of `CHUNK`.
        steps: tokens fed singly after the prefill; of a greedy continuation as many are compared.
        haystack: what to retrieve, if anything (needle.py).
        unknown_arch, source: as for `compress`.
        joint: several schemes in one forward where the model allows it: faster, but products of other shapes round
            differently, and a scheme that rounds coarsely makes that visible (a few percent of its mean KL).
        progress: called with what is being done, and how much of it.

    Memory on top of the model: the caches of all texts, twice, for `TOGETHER` schemes and the reference, and their
    logits `(B, V)` of a step, three times.

    Raises:
        KVQError: for a text that is too short.
        UnsupportedModelError: for a model that cannot be compressed, or is.
    """
    for name, ids in texts.items():
        if len(ids) < prefill + steps:
            raise KVQError(
                f"a text must have prefill + steps = {prefill} + {steps} = {prefill + steps} tokens, got {len(ids)} "
                f"in {name}; give a longer text or ask for fewer tokens"
            )
    tokens = mx.array([list(ids[: prefill + steps]) for ids in texts.values()])
    bench = _Bench(model, tuple(texts), tokens, prefill, haystack, unknown_arch, source, joint, progress)
    needle: tuple[Retrieval, ...] = ()
    reference = bench.contender(FP16)  # raises what is wrong with the model, not with a scheme
    if haystack is not None:
        with bench.routed():
            needle = bench.retrieved(reference)
    for start in range(0, len(schemes), TOGETHER):
        yield from bench.group(schemes[start : start + TOGETHER], needle)


@dataclass(frozen=True)
class _Bench:
    """A model, what it is fed, and the steps of measuring one group of schemes; `measure` explains the fields."""

    model: Any
    names: tuple[str, ...]
    tokens: mx.array
    prefill: int
    haystack: Haystack | None
    unknown_arch: str
    source: str
    joint: bool
    progress: Progress

    @property
    def steps(self) -> int:
        """Tokens after the prefill."""
        return int(self.tokens.shape[1]) - self.prefill

    def contender(self, scheme: str) -> Contender:
        """A scheme with fresh caches; raises `KVQError` for what the model cannot do."""
        return make_contender(self.model, scheme, self.unknown_arch, self.source, self.progress)

    def group(self, schemes: Sequence[str], needle: tuple[Retrieval, ...]) -> list[SchemeResult]:
        """The results of a few schemes, whose caches are all held at once."""
        contenders, results = list[Contender](), dict[str, SchemeResult]()
        for scheme in dict.fromkeys(schemes):
            try:
                contenders.append(self.contender(scheme))
            except KVQError as error:
                results[scheme] = SchemeResult(scheme, error=" ".join(str(error).split()))
        for exact in (False, True):
            some = [contender for contender in contenders if contender.exact is exact]
            if some:
                found = self.measured(some, needle, joint=self.joint and not exact)
                results.update((result.scheme, result) for result in found)
        return [results[scheme] for scheme in schemes]

    def measured(
        self, contenders: Sequence[Contender], needle: tuple[Retrieval, ...], joint: bool
    ) -> Iterator[SchemeResult]:
        """The results of contenders with fresh caches; `joint`: in one forward, if the model can."""
        reference = self.contender(FP16)
        fresh = {contender.scheme: contender.copied() for contender in contenders}
        with self.routed() as modules:
            joint = joint and bool(modules) and all(can_join(run.caches) for run in (reference, *contenders))
            errors = self.prefilled([reference, *contenders], joint)
            yield from (SchemeResult(scheme, error=error) for scheme, error in errors.items())
            running = [contender for contender in contenders if contender.scheme not in errors]
            scores, lengths = self.stepped([reference, *running], joint)
            found = [self.retrieved(fresh[contender.scheme]) for contender in running]
        held = (len(self.names), int(self.tokens.shape[1]), self.steps)
        for i, contender in enumerate(running):
            yield SchemeResult(
                contender.scheme,
                note=contender.note,
                bits=contender.bits,
                nbytes=contender.nbytes,
                nbytes_16bit=contender.nbytes_16bit(*held),
                fp16_nbytes=cache_report(reference.caches).fp16_nbytes,
                overall=scores[i].fidelity(),
                texts={
                    name: TextResult(scores[i].row(row).fidelity(), lengths[i][row])
                    for row, name in enumerate(self.names)
                },
                needle=found[i],
                reference_needle=needle,
            )

    @contextmanager
    def routed(self) -> Iterator[list[Globals]]:
        """The model with its attention routed for all kinds of caches; what `lockstep_modules` says of it."""
        with compress(self.model, ROUTES, unknown_arch=self.unknown_arch) as compression:
            modules = lockstep_modules(compression.maker)
            with lockstep(modules):
                yield modules

    def prefilled(self, runs: Sequence[Contender], joint: bool) -> dict[str, str]:
        """Feed the first tokens to the caches of all runs; why it failed, by scheme."""
        tokens, errors = self.tokens[:, : self.prefill], dict[str, str]()
        if joint:
            self.progress(f"{len(runs) - 1} schemes: prefill", 0, 1)
            joint_chunk(self.model, [run.caches for run in runs], tokens[:, :CHUNK])
        for i, run in enumerate(runs):
            self.progress(f"{run.scheme}: prefill", i, len(runs))
            try:
                if joint:
                    run.end_chunk()
                run.prefill(self.model, tokens[:, CHUNK:] if joint else tokens)
                if run.affine is not None:  # the first chunk saw dense keys
                    mx.eval(run.copied().step(self.model, self.tokens[:, :1]))
            except Exception as error:  # each model file that cannot read quantized keys raises something else
                if run.affine is None:
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                errors[run.scheme] = f"mlx-lm's quantized caches do not run on this model: {reason}"
        return errors

    def stepped(self, runs: Sequence[Contender], joint: bool) -> tuple[list[Scores], list[list[int]]]:
        """Feed what follows the prefill to all caches, a token at a time, while copies of them run freely.

        Args:
            runs: the reference and its contenders.
            joint: in one forward.

        Returns:
            For each contender its scores, and how many greedy tokens of each text are the reference's.
        """
        columns, free = _Columns(), _FreeRuns([[0] * len(self.names) for _ in runs[1:]])
        for i in range(self.prefill, int(self.tokens.shape[1])):
            self.progress(f"{len(runs) - 1} schemes: steps", i - self.prefill, self.steps)
            forced, following = self.tokens[:, i : i + 1], self.tokens[:, i + 1 : i + 2]  # none follows the last one
            caches = [run.caches for run in runs] + list(free.caches.values())
            tokens = mx.stack([forced] * len(runs) + [free.newest] * len(free.caches))
            logits = self.logits(caches, tokens, joint)
            columns.add(logprobs(logits[: len(runs)]), following)
            if i == self.prefill:  # the one token that both are fed
                free.add(dict(enumerate(copy.deepcopy(caches))), logits)
            elif free.caches:
                free.add(free.caches, logits[len(runs) :])
        return columns.scores(), free.lengths

    def logits(self, caches: Sequence[list[Any]], tokens: mx.array, joint: bool) -> mx.array:
        """Logits `(N, B, V)` after one more token of each row `(N, B, 1)`."""
        if joint:
            return joint_logits(self.model, caches, tokens)
        return mx.stack([self.model(new, cache=run)[:, -1] for run, new in zip(caches, tokens, strict=True)])

    def retrieved(self, contender: Contender) -> tuple[Retrieval, ...]:
        """What a scheme finds in the haystack, if there is one; needs its caches fresh."""
        if self.haystack is None:
            return ()
        self.progress(f"{contender.scheme}: needle", 0, 1)
        return retrieve(
            self.haystack,
            lambda tokens, chunk: contender.prefill(self.model, tokens, chunk),
            lambda tokens: contender.step(self.model, tokens),
        )


@dataclass
class _FreeRuns:
    """Greedy continuations of the reference and of the contenders, each until none of its texts is the reference's.

    Up to its first other token a scheme is fed the reference's tokens, so all are fed these.

    Attributes:
        lengths: for each contender, of each text, how many tokens are the reference's.
        caches: by number, the reference's as 0; empty when nothing goes on.
        newest: the reference's newest tokens `(B, 1)`.
        steps: tokens so far.
    """

    lengths: list[list[int]]
    caches: dict[int, list[Any]] = field(default_factory=dict)
    newest: mx.array = field(default_factory=lambda: mx.zeros((0, 1), mx.int32))
    steps: int = 0

    def add(self, caches: Mapping[int, list[Any]], logits: mx.array) -> None:
        """Choose the next token from logits `(N, B, V)` of so many runs, which go on with `caches`."""
        likeliest = mx.argmax(logits, axis=-1)
        same: Any = (likeliest[1:] == likeliest[:1]).tolist()
        for number, row in zip(list(caches)[1:], same, strict=True):
            known = self.lengths[number - 1]
            self.lengths[number - 1] = [
                length + (kept and length == self.steps) for length, kept in zip(known, row, strict=True)
            ]
        self.newest, self.steps = likeliest[0][:, None], self.steps + 1
        going = [number for number in list(caches)[1:] if max(self.lengths[number - 1]) == self.steps]
        self.caches = {number: caches[number] for number in [0, *going]} if going else {}


@dataclass(frozen=True)
class _Columns:
    """The parts of `Scores` while they grow: `(N, B)` a position, N contenders."""

    kl: list[mx.array] = field(default_factory=list)
    same: list[mx.array] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)
    reference_logprobs: list[mx.array] = field(default_factory=list)

    def add(self, found: mx.array, following: mx.array) -> None:
        """A position.

        Args:
            found: log probabilities `(1 + N, B, V)`, the reference's first.
            following: the next token of every text `(B, 1)`, or `(B, 0)` at the end.
        """
        expected, others = found[:1], found[1:]
        targets = mx.broadcast_to(following, (*found.shape[:2], following.shape[-1]))
        of_targets = mx.take_along_axis(found, targets, axis=-1)
        self.kl.append(divergence(expected, others))
        self.same.append(agreement(expected, others))
        self.logprobs.append(of_targets[1:])
        self.reference_logprobs.append(of_targets[:1])
        mx.eval(self.kl[-1], self.same[-1], of_targets)

    def scores(self) -> list[Scores]:
        """All positions, for each contender."""
        kl, same = mx.stack(self.kl, axis=-1), mx.stack(self.same, axis=-1)
        own, reference = mx.concatenate(self.logprobs, axis=-1), mx.concatenate(self.reference_logprobs, axis=-1)
        return [Scores(kl[i], same[i], own[i], reference[0]) for i in range(kl.shape[0])]
