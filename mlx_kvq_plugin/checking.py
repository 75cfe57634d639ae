"""Conformance on the user's own model: what `kvq check` runs.

The identity codec must give, bit for bit, the logits of mlx-lm's own caches wherever the same operations run. A lossy
scheme is compared with itself where nothing may change (saving, copying, another thread), and with mlx-lm's caches by
KL divergence where it costs quality. Batches are compared with single runs of the same scheme; their matrix products
have other shapes and round differently, so there a small divergence is allowed (`ROUNDING`).
"""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import cache as mlx_cache

from .adapters import SLIDING
from .config import KVQConfig
from .errors import CacheStateError, KVQError, UnsupportedModelError
from .evaluation import compare
from .loading import Compression, compress, compression_of, make_prompt_cache
from .progress import Progress, silent
from .prompt_cache import load_prompt_cache, save_prompt_cache
from .report import CacheReport, cache_report
from .routing import NAME
from .schemes import format_scheme, parse_scheme

IDENTITY = "identity"
LEAST_TOKENS = 128  # fewer would leave nothing to pack
MAX_KL = 1.0  # nats a token: a scheme that is this far off does not write the same language any more
COMPARED = 32  # positions of a call whose logits are compared, the last ones: what is wrong earlier reaches them

# KL(single || batch) in nats a token, the largest of all positions, that rounding alone may cause.
ROUNDING = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 0.1}

EXACT, OK, REFUSED, FAIL = "exact", "ok", "refused", "FAIL"

Outcome = tuple[str, str]  # status and detail

_BEFORE, _AFTER = 2, 8  # steps before a cache is saved or copied, and after; tokens of a batch's answers
_THREAD_STEPS = [1] * 4


@dataclass(frozen=True)
class Check:
    """One cell of the table.

    Attributes:
        scheme: what the caches were made with.
        name: what was done.
        status: `exact` (equal bits), `ok` (within the stated limit), `refused` (this model or mlx-lm cannot do it) or
            `FAIL`.
        detail: figures or the reason.
    """

    scheme: str
    name: str
    status: str
    detail: str = ""

    def row(self, width: int) -> str:
        """One line of a table whose first column is `width` characters wide."""
        mark = ": " if self.status in (REFUSED, FAIL) else ", "
        return f"{self.scheme:{width}s}  {self.name:18s} {self.status}{mark if self.detail else ''}{self.detail}"


@dataclass(frozen=True)
class CheckReport:
    """Every check of a model."""

    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == FAIL)

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return not self.failures

    def summary(self) -> str:
        """One line: how many of each status."""
        found = [check.status for check in self.checks]
        return f"{len(found)} checks: " + ", ".join(f"{found.count(s)} {s}" for s in (EXACT, OK, REFUSED, FAIL))

    def __str__(self) -> str:
        width = max(len(check.scheme) for check in self.checks)
        return "\n".join([*(check.row(width) for check in self.checks), self.summary()])


class _Refused(Exception):
    """The model, or mlx-lm, cannot do what the check needs; the message says why."""


@dataclass(frozen=True)
class _Subject:
    """A model, the tokens it is fed, and what mlx-lm's own caches give for them.

    Attributes:
        model: compressed with a scheme while its checks run.
        tokens: fed in this order; the last `steps` ones as single steps.
        steps: how many.
        stock: makes mlx-lm's caches.
        window: the smallest one of its sliding layers, 0 without any.
        known: logits of mlx-lm's caches by what was fed; shared by all schemes.
    """

    model: Any
    tokens: list[int]
    steps: int
    stock: Callable[[], list[Any]]
    window: int
    known: dict[tuple[Any, ...], mx.array]

    @property
    def prompt(self) -> int:
        """Tokens before the steps."""
        return len(self.tokens) - self.steps

    @property
    def whole(self) -> list[int]:
        """Sizes of the calls that feed all tokens: the prompt, then steps."""
        return [self.prompt] + [1] * self.steps

    @property
    def inside(self) -> int:
        """Tokens of a prompt that the tokens after it do not push out of a window."""
        return min(self.prompt, self.window - 16) if self.window else self.prompt

    def feed(self, caches: list[Any], sizes: Sequence[int], start: int = 0) -> mx.array:
        """Feed the tokens from `start` on in calls of `sizes`; logits `(_, V)` of the last `COMPARED` of each call."""
        rows = []
        for size in sizes:
            tokens = [self.tokens[i % len(self.tokens)] for i in range(start, start + size)]
            rows.append(self.model(mx.array([tokens]), cache=caches)[0, -COMPARED:])
            mx.eval(rows[-1], [cache.state for cache in caches] if size > 1 else [])
            start += size
        logits = mx.concatenate(rows, axis=0)
        mx.eval(logits)  # here: another thread could not
        return logits

    def trimmed(self, caches: list[Any], sizes: Sequence[int], dropped: int, then: Sequence[int]) -> mx.array:
        """Feed calls of `sizes` tokens, drop the last ones, and feed others, of which the logits are returned."""
        self.feed(caches, sizes)
        if not mlx_cache.can_trim_prompt_cache(caches):
            kinds = sorted({type(cache).__name__ for cache in caches if not cache.is_trimmable()})
            raise _Refused(f"{' and '.join(kinds)} cannot be trimmed")
        if mlx_cache.trim_prompt_cache(caches, dropped) != dropped:
            raise ValueError(f"{dropped} tokens were not trimmed")
        return self.feed(caches, then, start=7)

    def expected(self, sizes: Sequence[int], dropped: int = 0, then: Sequence[int] = ()) -> mx.array:
        """What `feed`, or `trimmed`, returns with mlx-lm's caches."""
        key = (tuple(sizes), dropped, tuple(then))
        if key not in self.known:
            caches = self.stock()
            self.known[key] = self.trimmed(caches, sizes, dropped, then) if dropped else self.feed(caches, sizes)
        return self.known[key]


def _logprobs(logits: mx.array) -> mx.array:
    wide = logits.astype(mx.float32)
    return wide - mx.logsumexp(wide, axis=-1, keepdims=True)


@dataclass(frozen=True)
class _Run:
    """The checks of one scheme.

    Attributes:
        subject: what is checked.
        lossless: whether logits must equal those of mlx-lm's caches.
        prompt, steps: logits of the prompt in one piece, and of the single steps after it.
        threaded: logits of the prompt and the first steps in another thread, before this one used the scheme.
        report: on the caches of `steps`.
        max_kl: largest mean divergence from mlx-lm's caches that passes.
        alone: single runs that batches are compared with, once they are known.
    """

    subject: _Subject
    lossless: bool
    prompt: mx.array
    steps: mx.array
    threaded: mx.array | Exception
    report: CacheReport
    max_kl: float
    alone: list[tuple[list[int], mx.array]] = field(default_factory=list)

    def caches(self) -> list[Any]:
        """Fresh caches of the scheme."""
        return make_prompt_cache(self.subject.model)

    def same(self, expected: mx.array, found: mx.array) -> Outcome:
        """Equal bits, or a failure."""
        if mx.array_equal(expected, found):
            return EXACT, ""
        largest = mx.max(mx.abs(expected.astype(mx.float32) - found.astype(mx.float32))).item()
        return FAIL, f"logits differ by up to {largest:.3g}"

    def near(self, expected: mx.array, found: mx.array) -> Outcome:
        """Equal bits without loss, else a divergence from mlx-lm's logits within the limit."""
        if self.lossless:
            return self.same(expected, found)
        if not mx.all(mx.isfinite(found)).item():
            return FAIL, "logits are not finite"
        fidelity = compare(_logprobs(expected), _logprobs(found), [0] * expected.shape[0])
        detail = f"KL {fidelity.kl_mean:.3g} nats a token, top-1 {fidelity.top1:.1%}"
        if not fidelity.kl_mean <= self.max_kl:
            return FAIL, f"{detail}; the limit is {self.max_kl:g} nats"
        return OK, detail


# ---- one sequence --------------------------------------------------------------------------------------------------


def _prefill(run: _Run) -> Outcome:
    return run.near(run.subject.expected(run.subject.whole)[: -run.subject.steps], run.prompt)


def _chunks(run: _Run) -> Outcome:
    first = run.subject.prompt // 2
    sizes = [first, 1, 17, run.subject.prompt - first - 18]
    return run.near(run.subject.expected(sizes), run.subject.feed(run.caches(), sizes))


def _steps(run: _Run) -> Outcome:
    return run.near(run.subject.expected(run.subject.whole)[-run.subject.steps :], run.steps)


def _past_window(run: _Run) -> Outcome:
    window, wanted = run.subject.window, run.subject.window + run.subject.steps
    if wanted > len(run.subject.tokens):
        raise _Refused(f"the window has {window} tokens; ask for {wanted} with --tokens")
    sizes = [window - run.subject.steps // 2] + [1] * run.subject.steps
    return run.near(run.subject.expected(sizes), run.subject.feed(run.caches(), sizes))


def _bytes(run: _Run) -> Outcome:
    if run.report.compressed == 0:
        raise _Refused(f"no layer is compressed: {run.report.layers[0].note}")
    if not any(layer.packed for layer in run.report.layers):
        raise _Refused("nothing was packed; ask for more --tokens")
    return OK, run.report.summary()


def _trimmed(run: _Run, sizes: list[int], dropped: int, then: list[int]) -> Outcome:
    if run.subject.inside < LEAST_TOKENS // 2:
        raise _Refused(f"a window of {run.subject.window} tokens leaves no room to trim")
    expected = run.subject.expected(sizes, dropped, then)
    try:
        return run.near(expected, run.subject.trimmed(run.caches(), sizes, dropped, then))
    except _Refused as error:
        return FAIL, f"mlx-lm's own caches can be trimmed, but {error}"


def _trim(run: _Run) -> Outcome:
    return _trimmed(run, [run.subject.inside - 2, 1, 1], 40, [20, 1, 1, 1, 1])


def _verify(run: _Run) -> Outcome:
    """As speculative decoding: several tokens in one step, of which the last ones are taken back."""
    return _trimmed(run, [run.subject.inside - 2, 1, 5], 3, [5, 1, 1, 1])


def _interrupted(run: _Run) -> list[Any]:
    """Caches in the middle of the steps."""
    caches = run.caches()
    run.subject.feed(caches, [run.subject.prompt] + [1] * _BEFORE)
    return caches


def _continued(run: _Run, caches: list[Any]) -> Outcome:
    found = run.subject.feed(caches, [1] * _AFTER, run.subject.prompt + _BEFORE)
    return run.same(run.steps[_BEFORE : _BEFORE + _AFTER], found)


def _save_load(run: _Run) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="kvq-check-") as folder:
        path = Path(folder) / "cache.safetensors"
        save_prompt_cache(path, _interrupted(run), model=run.subject.model)
        caches, _ = load_prompt_cache(path, run.subject.model)
    return _continued(run, caches)


def _deepcopy(run: _Run) -> Outcome:
    caches = _interrupted(run)
    used, kept = copy.deepcopy(caches), copy.deepcopy(caches)
    run.subject.feed(used, [20, 1, 1], start=5)
    status, detail = _continued(run, kept)
    return (status, detail) if status != EXACT else _continued(run, caches)


def _in_thread(subject: _Subject) -> mx.array | Exception:
    """As mlx-lm's server, which generates in a thread of its own: arrays that loading left lazy fail there."""
    found: list[mx.array | Exception] = []

    def work() -> None:
        try:
            found.append(subject.feed(make_prompt_cache(subject.model), [subject.prompt, *_THREAD_STEPS]))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def _thread(run: _Run) -> Outcome:
    if isinstance(run.threaded, Exception):
        raise run.threaded
    return run.same(mx.concatenate([run.prompt, run.steps[: len(_THREAD_STEPS)]]), run.threaded)


# ---- batches -------------------------------------------------------------------------------------------------------


def _uneven_batch(run: _Run) -> Outcome:
    return _batched(run, late=False)


def _late_joiner(run: _Run) -> Outcome:
    return _batched(run, late=True)


def _batched(run: _Run, late: bool) -> Outcome:
    """mlx-lm's batched generation of three sequences of other lengths against each of them alone."""
    subject = run.subject
    lengths = [subject.prompt, subject.prompt // 5, subject.prompt // 2]
    if not run.alone:
        run.alone.extend(_greedy(subject, run.caches(), length) for length in lengths)
    try:
        together = _batch(subject, run.caches, lengths, run.alone, late)
    except ValueError as error:
        if "does not yet support batching" in str(error):
            raise _Refused(str(error).rstrip(".")) from error
        raise
    except CacheStateError as error:
        maker = compression_of(subject.model)
        if maker is None or not maker.adapter.padding_refused:
            raise
        raise _Refused(" ".join(str(error).split())) from error
    limit, largest = _rounding(subject.model), _largest_kl(run.alone, together)
    same = all(
        mx.array_equal(mx.argmax(a, axis=-1), mx.argmax(b, axis=-1))
        for (_, a), b in zip(run.alone, together, strict=True)
    )
    detail = f"{'same' if same else 'other'} tokens as alone, KL up to {largest:.2g} nats (rounding: {limit:g})"
    if largest <= limit and (same or limit > ROUNDING[mx.float32]):
        return OK, detail
    stock = [_greedy(subject, subject.stock(), length) for length in lengths]
    if _largest_kl(stock, _batch(subject, subject.stock, lengths, stock, late)) > limit:
        raise _Refused("mlx-lm's own batches of this model differ from single runs too")
    return FAIL, detail


def _rounding(model: Any) -> float:
    parameters: Any = tree_flatten(model.parameters())
    return max(ROUNDING.get(value.dtype, 0.0) for _, value in parameters)


def _largest_kl(alone: list[tuple[list[int], mx.array]], together: list[mx.array]) -> float:
    return max(compare(a, b, tokens).kl_max for (tokens, a), b in zip(alone, together, strict=True))


def _greedy(subject: _Subject, caches: list[Any], length: int) -> tuple[list[int], mx.array]:
    """Greedy tokens after the first `length` ones, and their log probabilities `(_AFTER, V)`."""
    subject.feed(caches, [length - 1])
    tokens, rows = [subject.tokens[length - 1]], []
    for _ in range(_AFTER):
        rows.append(_logprobs(subject.model(mx.array([tokens[-1:]]), cache=caches)[0, -1]))
        tokens.append(mx.argmax(rows[-1]).item())  # type: ignore[arg-type]
    return tokens[1:], mx.stack(rows)


class _Forced:
    """A sampler that takes given tokens, so that a batch stays comparable after a near tie; never copied."""

    def __init__(self, tokens: list[int]):
        self._tokens = iter(tokens)

    def __call__(self, logprobs: mx.array) -> mx.array:
        return mx.array([next(self._tokens, 0)])

    def __deepcopy__(self, memo: object) -> _Forced:
        return self


def _batch(
    subject: _Subject,
    make: Callable[[], list[Any]],
    lengths: list[int],
    alone: list[tuple[list[int], mx.array]],
    late: bool,
) -> list[mx.array]:
    """Log probabilities `(_AFTER, V)` of every row, which is made to answer as it did alone."""
    generator = BatchGenerator(subject.model, max_tokens=_AFTER)
    found: dict[int, list[mx.array]] = {}
    uids: list[int] = []

    def insert(rows: range) -> None:
        prompts, samplers = [subject.tokens[: lengths[i]] for i in rows], [_Forced(alone[i][0]) for i in rows]
        uids.extend(generator.insert(prompts, caches=[make() for _ in rows], samplers=samplers))

    def advance() -> bool:
        prompts, responses = generator.next()
        for response in responses:
            found.setdefault(response.uid, []).append(_logprobs(response.logprobs))
        return bool(prompts or responses)

    try:
        insert(range(1) if late else range(len(lengths)))
        for _ in range(4):
            advance()
        if late:
            insert(range(1, len(lengths)))
        while advance():
            pass
    finally:
        generator.close()
    return [mx.stack(found[uid]) for uid in uids]


# ---- running them --------------------------------------------------------------------------------------------------

_CHECKS: dict[str, Callable[[_Run], Outcome]] = {
    "prefill": _prefill,
    "chunked prefill": _chunks,
    "single steps": _steps,
    "past the window": _past_window,
    "bytes": _bytes,
    "uneven batch": _uneven_batch,
    "late joiner": _late_joiner,
    "trim and continue": _trim,
    "verify and trim": _verify,
    "save and load": _save_load,
    "deep copy": _deepcopy,
    "another thread": _thread,
}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _outcome(check: Callable[[_Run], Outcome], run: _Run) -> Outcome:
    try:
        return check(run)
    except _Refused as error:
        return REFUSED, str(error)
    except Exception as error:  # whatever a model file raises is a finding, not the end
        return FAIL, _one_line(error)


def _footprint(model: Any) -> tuple[Any, ...]:
    """What compressing may change: the model's `make_cache`, its modules' classes, and mlx-lm's attention functions."""
    files = {name: vars(file) for name, file in sys.modules.items() if name.startswith("mlx_lm.models.")}
    return (
        vars(model).get("make_cache"),
        [type(module) for _, module in model.named_modules()],
        {name: file[NAME] for name, file in files.items() if NAME in file},
    )


def _window(compression: Compression) -> int:
    windows = [plan.geometry.window or 0 for plan in compression.maker.plan() if plan.geometry.kind == SLIDING]
    return min(windows, default=0)


def _checks(subject: _Subject, compression: Compression, max_kl: float) -> Iterator[tuple[str, Outcome]]:
    """The checks of one scheme, while the model is compressed with it."""
    specs = [plan.spec for plan in compression.maker.plan() if plan.spec is not None]
    try:
        subject.expected(subject.whole)  # evaluates what the model's own file left lazy
        threaded = _in_thread(subject)
        caches = make_prompt_cache(subject.model)
        prompt = subject.feed(caches, [subject.prompt])
        steps = subject.feed(caches, [1] * subject.steps, subject.prompt)
    except Exception as error:
        yield "single steps", (FAIL, _one_line(error))
        return
    lossless = all(spec.key == spec.value == IDENTITY for spec in specs)
    run = _Run(subject, lossless, prompt, steps, threaded, cache_report(caches), max_kl)
    for name, check in _CHECKS.items():
        if subject.window or check is not _past_window:
            yield name, _outcome(check, run)


def _check_scheme(
    model: Any,
    config: KVQConfig,
    tokens: list[int],
    known: dict[tuple[Any, ...], mx.array],
    arch: str,
    source: str,
    max_kl: float,
) -> Iterator[tuple[str, Outcome]]:
    before, original = _footprint(model), getattr(model, "make_cache", None)

    def stock() -> list[Any]:
        return [mlx_cache.KVCache() for _ in model.layers] if original is None else list(original())

    with compress(model, config, unknown_arch=arch, source=source) as compression:
        subject = _Subject(model, tokens, min(32, len(tokens) // 8), stock, _window(compression), known)
        yield from _checks(subject, compression, max_kl)
    gc.collect()  # caches read from a file keep their attention routed while they live
    restored = _footprint(model) == before
    yield "undo", (EXACT, "") if restored else (FAIL, "the model or mlx-lm's attention is not what it was before")


def check_model(
    model: Any,
    tokenizer: Any = None,
    schemes: Sequence[str | KVQConfig] = ("tq4",),
    *,
    tokens: int = 256,
    unknown_arch: str = "error",
    source: str = "",
    max_kl: float = MAX_KL,
    done: Callable[[Check], None] = lambda check: None,
    progress: Progress = silent,
) -> CheckReport:
    """Check the identity codec and then each scheme on a model, in every way that mlx-lm runs one.

    Args:
        model: from mlx-lm, not compressed; it is compressed and restored once per scheme.
        tokenizer: its tokenizer, to feed it English text; without one it is fed arbitrary tokens.
        schemes: scheme strings or configs.
        tokens: how many tokens are fed, at least `LEAST_TOKENS`; more than a sliding window to check past it.
        unknown_arch, source: as for `compress`.
        max_kl: nats a token, on average over the compared positions, by which a lossy scheme may differ from mlx-lm's
            caches.
        done: called with each check when it is finished.
        progress: called with the scheme, and how many checks of all schemes are done.

    Returns:
        A report; costs about 12 prefills of `tokens` tokens and 150 steps for each scheme.

    Raises:
        SchemeError: for an invalid scheme.
        UnsupportedModelError: when the model has no adapter, or is compressed already.
    """
    configs = [parse_scheme(scheme) for scheme in schemes]
    if tokens < LEAST_TOKENS:
        raise KVQError(f"a check must feed at least {LEAST_TOKENS} tokens, got {tokens}; fewer would not be packed")
    if compression_of(model) is not None:
        raise UnsupportedModelError("a model must not be compressed to be checked, got one that is; call undo() first")
    mx.eval(model.parameters())  # weights that were loaded lazily are no fault of a cache
    identity = KVQConfig(key=IDENTITY, value=IDENTITY)
    fed, known = _text(model, tokenizer, tokens), dict[tuple[Any, ...], mx.array]()
    checks: list[Check] = []
    configs = [identity, *(config for config in configs if config != identity)]
    each = len(_CHECKS) + 1
    for i, config in enumerate(configs):
        progress(format_scheme(config), i * each, len(configs) * each)
        try:
            for name, (status, detail) in _check_scheme(model, config, fed, known, unknown_arch, source, max_kl):
                checks.append(Check(format_scheme(config), name, status, detail))
                done(checks[-1])
                finished = sum(check.scheme == format_scheme(config) for check in checks)
                progress(format_scheme(config), i * each + finished, len(configs) * each)
        except KVQError as error:  # compress refuses: the model altogether, or this scheme for it
            if config == identity:
                raise
            checks.append(Check(format_scheme(config), "compress", REFUSED, " ".join(str(error).split())))
            done(checks[-1])
    return CheckReport(tuple(checks))


def _text(model: Any, tokenizer: Any, count: int) -> list[int]:
    """Tokens of Python's own manual, or arbitrary ones."""
    if tokenizer is None:
        size = model(mx.array([[0]])).shape[-1]
        return [(7 * i * i + 3 * i) % size for i in range(count)]
    from pydoc_data.topics import topics  # 800 KB: imported when needed

    ids: list[int] = []
    for _, text in sorted(topics.items(), key=lambda item: -len(item[1])):
        ids += tokenizer.encode(text[: 8 * count])
        if len(ids) >= count:
            break
    return ids[:count]
