"""The ruler: what schemes cost on a model, all measured in one way.

Texts of equal length are the rows of one batch. After a prefill every token is a step of its own through the real
compressed cache, and the same step runs through mlx-lm's caches on the same weights: both at once, so that log
probabilities `(B, V)` are reduced to scalars and forgotten. Reference and schemes share one routed model, which sends
mlx-lm's caches to mlx-lm's own attention; fp16 against fp16 is exactly 0 in every distance.

Beside this package's schemes the ruler runs mlx-lm's quantized caches, as `mlx-affine8` to `mlx-affine2`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from .cache import KVQCache
from .config import FP16
from .errors import KVQError, SchemeError, UnsupportedModelError
from .evaluation import Scores, agreement, divergence, logprobs
from .loading import LayerPlan, compress, make_prompt_cache
from .needle import Haystack, Retrieval, retrieve
from .report import cache_report
from .results import SchemeResult, TextResult
from .schemes import list_schemes, parse_scheme

AFFINE = "mlx-affine"
AFFINE_BITS = (8, 6, 5, 4, 3, 2)
AFFINE_GROUPS = (64, 32)  # the first one that divides the head sizes
ROUTES = "identity,sinks=0,recent=0"  # compresses every layer that any scheme does, so that all of them are routed
TOGETHER = 8  # schemes whose caches are held at a time; the reference runs once for each so many
CHUNK = 2048  # tokens of a prefill chunk, as in mlx-lm

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def affine_bits(name: str) -> int | None:
    """Bits of `mlx-affine4` and its like, `None` for schemes of this package; raises `SchemeError`."""
    if not name.startswith(AFFINE):
        return None
    if name not in {f"{AFFINE}{bits}" for bits in AFFINE_BITS}:
        known = ", ".join(f"{AFFINE}{bits}" for bits in AFFINE_BITS)
        raise SchemeError(f"mlx-lm's quantized caches must be one of {known}, got {name!r}; write one of these names")
    return int(name.removeprefix(AFFINE))


def check_scheme(name: str) -> None:
    """Raise `SchemeError` for a name that the ruler does not know."""
    if affine_bits(name) is None:
        parse_scheme(name)


def all_schemes(head_dim: int) -> list[str]:
    """Every named scheme and every one of a single codec, without those that lose nothing, and mlx-lm's caches."""
    lossy = [row.name for row in list_schemes(head_dim) if row.bits is None or not _lossless(row.name)]
    return lossy + [f"{AFFINE}{bits}" for bits in AFFINE_BITS]


def _lossless(name: str) -> bool:
    spec = parse_scheme(name).layer_spec()
    return name == FP16 or spec.key == spec.value == "identity"


def head_dim(model: Any, unknown_arch: str = "error") -> int:
    """The head size of the model's first layer with keys and values."""
    with compress(model, FP16, unknown_arch=unknown_arch) as compression:
        return next(plan.geometry.key_dim for plan in compression.maker.plan() if plan.geometry.kv_heads)


# ---- caches of one scheme --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contender:
    """A scheme with fresh caches.

    Attributes:
        scheme, bits, note: as in `SchemeResult`.
        caches: changed by every call.
        affine: bits and group size of mlx-lm's quantized caches, which `caches` become in the prefill.
    """

    scheme: str
    bits: float
    note: str
    caches: list[Any]
    affine: tuple[int, int] | None = None

    def prefill(self, model: Any, tokens: mx.array, chunk: int = CHUNK) -> None:
        """Feed `(B, L)` in chunks; the logits are never computed."""
        for start in range(0, tokens.shape[1], chunk):
            model(tokens[:, start : start + chunk], cache=self.caches)
            if self.affine is not None:
                bits, group = self.affine
                for i, cache in enumerate(self.caches):
                    if type(cache) is KVCache:
                        self.caches[i] = cache.to_quantized(group_size=group, bits=bits)
            mx.eval([cache.state for cache in self.caches])

    def step(self, model: Any, tokens: mx.array) -> mx.array:
        """Logits `(B, V)` after one more token a row, `(B, 1)`."""
        logits: mx.array = model(tokens, cache=self.caches)[:, -1]
        return logits

    def copied(self) -> _Contender:
        """The same with caches of its own."""
        return _Contender(self.scheme, self.bits, self.note, copy.deepcopy(self.caches), self.affine)


def _contender(model: Any, name: str, unknown_arch: str, source: str) -> _Contender:
    """Fresh caches of a scheme; raises `KVQError` for what the model cannot do."""
    affine = affine_bits(name)
    with compress(model, FP16 if affine else name, unknown_arch=unknown_arch, source=source) as compression:
        plans, caches = compression.maker.plan(), make_prompt_cache(model)
    layers = [(plan, cache) for plan, cache in zip(plans, caches, strict=True) if plan.geometry.kv_heads]
    if affine is None:
        sides = [_codec_bits(plan, cache) for plan, cache in layers]
        note = _left([plan.reason for plan, _ in layers if plan.spec is None], len(layers)) if name != FP16 else ""
        return _Contender(name, _average(layers, sides), note, caches)
    dims = [dim for plan, cache in layers if type(cache) is KVCache for dim in _dims(plan)]
    group = next((size for size in AFFINE_GROUPS if all(dim % size == 0 for dim in dims)), None)
    if group is None or not dims:
        raise UnsupportedModelError(
            f"mlx-lm's quantized caches must have KVCache layers whose head size is a multiple of "
            f"{AFFINE_GROUPS[-1]}, got {sorted(set(dims)) or 'none'}; leave {name} out"
        )
    stored = affine + 32 / group  # a scale and a bias of 16 bits
    sides = [(stored, stored) if type(cache) is KVCache else (16.0, 16.0) for _, cache in layers]
    kept = [f"mlx-lm cannot quantize a {type(cache).__name__}" for _, cache in layers if type(cache) is not KVCache]
    return _Contender(name, _average(layers, sides), _left(kept, len(layers)), caches, (affine, group))


def _dims(plan: LayerPlan) -> tuple[int, int]:
    return plan.geometry.key_dim, plan.geometry.value_dim


def _codec_bits(plan: LayerPlan, cache: Any) -> tuple[float, float]:
    """Bits per element of keys and of values."""
    if plan.geometry.member is not None:
        cache = cache.caches[plan.geometry.member]
    if not isinstance(cache, KVQCache):
        return 16.0, 16.0
    keys, values = _dims(plan)
    return cache.key_codec.bits_per_element(keys), cache.value_codec.bits_per_element(values)


def _average(layers: Sequence[tuple[LayerPlan, Any]], sides: Sequence[tuple[float, float]]) -> float:
    """Bits per element over all layers, by the elements that a token has in each."""
    bits, elements = 0.0, 0
    for (plan, _), (keys, values) in zip(layers, sides, strict=True):
        key_dim, value_dim = _dims(plan)
        bits += plan.geometry.kv_heads * (key_dim * keys + value_dim * values)
        elements += plan.geometry.kv_heads * (key_dim + value_dim)
    return bits / elements


def _left(reasons: Sequence[str], layers: int) -> str:
    if not reasons:
        return ""
    return f"{len(reasons)} of {layers} layers stay as they are: {'; '.join(dict.fromkeys(reasons))}"


# ---- measuring -------------------------------------------------------------------------------------------------------


def _silent(what: str, done: int, of: int) -> None:
    pass


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
    progress: Progress = _silent,
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
        progress: called with what is being done, and how much of it.

    Memory on top of the model: the caches of all texts, twice, for `TOGETHER` schemes and the reference, and the
    log probabilities `(B, V)` of two steps.

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
    bench = _Bench(model, tuple(texts), tokens, prefill, haystack, unknown_arch, source, progress)
    needle: tuple[Retrieval, ...] = ()
    if haystack is not None:
        reference = bench.contender(FP16)
        with compress(model, ROUTES, unknown_arch=unknown_arch):
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
    progress: Progress

    @property
    def steps(self) -> int:
        """Tokens after the prefill."""
        return int(self.tokens.shape[1]) - self.prefill

    def contender(self, scheme: str) -> _Contender:
        """A scheme with fresh caches; raises `KVQError` for what the model cannot do."""
        return _contender(self.model, scheme, self.unknown_arch, self.source)

    def group(self, schemes: Sequence[str], needle: tuple[Retrieval, ...]) -> list[SchemeResult]:
        """The results of a few schemes, whose caches are all held at once."""
        reference, contenders, errors = self.contender(FP16), list[_Contender](), dict[str, str]()
        for scheme in schemes:
            try:
                contenders.append(self.contender(scheme))
            except KVQError as error:
                errors[scheme] = " ".join(str(error).split())
        unused = {contender.scheme: contender.copied() for contender in contenders}
        with compress(self.model, ROUTES, unknown_arch=self.unknown_arch):
            reference.prefill(self.model, self.tokens[:, : self.prefill])
            for i, contender in enumerate(list(contenders)):
                self.progress(f"{contender.scheme}: prefill", i, len(contenders))
                try:
                    contender.prefill(self.model, self.tokens[:, : self.prefill])
                    if contender.affine is not None:  # the first chunk saw dense keys
                        mx.eval(contender.copied().step(self.model, self.tokens[:, :1]))
                except Exception as error:  # each model file that cannot read quantized keys raises something else
                    if contender.affine is None:
                        raise
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    errors[contender.scheme] = f"mlx-lm's quantized caches do not run on this model: {reason}"
                    contenders.remove(contender)
            lengths = self.greedy_lengths(reference, contenders)
            scores = self.teacher_forced(reference, contenders)
            retrieved = [self.retrieved(unused[contender.scheme]) for contender in contenders]
        results = {scheme: SchemeResult(scheme, error=error) for scheme, error in errors.items()}
        fp16_nbytes = cache_report(reference.caches).fp16_nbytes
        for contender, length, score, found in zip(contenders, lengths, scores, retrieved, strict=True):
            results[contender.scheme] = SchemeResult(
                contender.scheme,
                note=contender.note,
                bits=contender.bits,
                nbytes=cache_report(contender.caches).nbytes,
                fp16_nbytes=fp16_nbytes,
                overall=score.fidelity(),
                texts={name: TextResult(score.row(i).fidelity(), length[i]) for i, name in enumerate(self.names)},
                needle=found,
                reference_needle=needle,
            )
        return [results[scheme] for scheme in schemes]

    def greedy_lengths(self, reference: _Contender, contenders: Sequence[_Contender]) -> list[list[int]]:
        """How many greedy tokens of each text are the reference's, of at most `steps`; leaves the caches as they are.

        Up to its first other token a free-running scheme is fed the reference's tokens, so all are fed these, each
        until none of its texts still agrees.
        """
        new = self.tokens[:, self.prefill : self.prefill + 1]
        reference, running = reference.copied(), [contender.copied() for contender in contenders]
        lengths = {contender.scheme: [self.steps] * len(self.names) for contender in contenders}
        for i in range(self.steps):
            self.progress("greedy", i, self.steps)
            if not running:
                break
            expected = mx.argmax(reference.step(self.model, new), axis=-1)
            for contender in list(running):
                same: Any = (mx.argmax(contender.step(self.model, new), axis=-1) == expected).tolist()
                length = [
                    min(known, self.steps if kept else i)
                    for known, kept in zip(lengths[contender.scheme], same, strict=True)
                ]
                lengths[contender.scheme] = length
                if max(length) < self.steps:
                    running.remove(contender)
            new = expected[:, None]
        return list(lengths.values())

    def teacher_forced(self, reference: _Contender, contenders: Sequence[_Contender]) -> list[Scores]:
        """Feed what follows the prefill to all caches, a token at a time."""
        columns = [_Columns() for _ in contenders]
        for i in range(self.prefill, int(self.tokens.shape[1])):
            self.progress("steps", i - self.prefill, self.steps)
            new, following = self.tokens[:, i : i + 1], self.tokens[:, i + 1 : i + 2]  # none follows the last one
            expected = logprobs(reference.step(self.model, new))
            for contender, column in zip(contenders, columns, strict=True):
                column.add(expected, logprobs(contender.step(self.model, new)), following)
        return [column.scores() for column in columns]

    def retrieved(self, contender: _Contender) -> tuple[Retrieval, ...]:
        """What a scheme finds in the haystack, if there is one; needs its caches fresh."""
        if self.haystack is None:
            return ()
        self.progress(f"{contender.scheme}: needle", 0, 1)
        return retrieve(
            self.haystack,
            lambda tokens, chunk: contender.prefill(self.model, tokens, chunk),
            lambda tokens: contender.step(self.model, tokens),
        )


@dataclass(frozen=True)
class _Columns:
    """The parts of `Scores` while they grow, a column a position."""

    kl: list[mx.array] = field(default_factory=list)
    same: list[mx.array] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)
    reference_logprobs: list[mx.array] = field(default_factory=list)

    def add(self, expected: mx.array, found: mx.array, following: mx.array) -> None:
        """One position of log probabilities `(B, V)`, followed by tokens `(B, 1)`, or `(B, 0)` at the end."""
        self.kl.append(divergence(expected, found)[:, None])
        self.same.append(agreement(expected, found)[:, None])
        self.logprobs.append(mx.take_along_axis(found, following, axis=-1))
        self.reference_logprobs.append(mx.take_along_axis(expected, following, axis=-1))
        mx.eval(self.kl[-1], self.same[-1], self.logprobs[-1], self.reference_logprobs[-1])

    def scores(self) -> Scores:
        """All positions."""
        parts = (self.kl, self.same, self.logprobs, self.reference_logprobs)
        return Scores(*(mx.concatenate(part, axis=1) for part in parts))
