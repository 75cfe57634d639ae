"""Codecs against theory: error, inner products and bias on random unit vectors, and the bands they must lie in.

Keys x are uniform on the unit sphere, queries are y = rho x + sqrt(1 - rho^2) z with z uniform on the unit vectors
orthogonal to x and rho uniform on [-1, 1], so that <y, x> = rho is known and a multiplicative bias is a slope. A query
is independent of every other key; keys of the next block give the inner-product error as the TurboQuant paper (arXiv
2504.19874) states it. Products go through the codec's own estimator, as in attention; statistics are fitted to vectors
of their own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from .codebooks import Array
from .codecs import GROUP, LEAST_SQUARES, Codec, Planes, Published, get_codec, list_codecs
from .errors import CodecError
from .plugins import load_plugin
from .rotation import HADAMARD

SEEDS = 16  # the codec's seeds that the pairs are spread over
SIGMAS = 3.0
HEAD = 256  # tokens of a head

_FIT = 128  # further tokens of a head, which statistics are fitted to
_SHARE = 4  # codecs that are not stated unbiased are measured on 1 of so many pairs: only a bias is so hard to see
_SURE = 4  # times as many pairs decide about an unbiased codec that seems to have a bias
_NUMBERS = 300_000  # of the keys of one call: larger arrays cost more in page faults than in arithmetic
_BLOCK = 16  # keys and queries of one block of products
_SUMS = ("t", "tt", "d", "td", "dd", "error", "product")  # t = <y, x>, d = <y, x^> - <y, x>
_ROUNDING = 2.0**-8  # of a scale stored as bfloat16: how far it may move a slope
_PRODUCT_SLACK = 0.01  # of the products of unpacked codes in float32


@dataclass(frozen=True)
class Measurement:
    """One codec on random unit vectors; every `_se` is a standard error, by the scatter over heads of 256 vectors, or
    over seeds where that says more.

    Attributes:
        codec, dim, pairs: what was measured, on how many pairs.
        bits: all-in bits per element that the codec states, of float16 input.
        codes: bits per element without scales and norms: those of the planes of integers.
        stored: bits per element of the planes that it made.
        unbiased, shrinkage, band, published: what the codec states of itself.
        mse: E ||x - x^||^2.
        product: D E (<y, x^> - <y, x>)^2 for independent x and y, by its own estimator of inner products;
            `product_se` is the error of its difference from `mse`.
        bias: E (<y, x^> - <y, x>) at <y, x> = 0.
        slope: of <y, x^> over <y, x>, less 1: the multiplicative bias.
        correlation: of <y, x^> and <y, x>.
        failures: one sentence for everything that theory does not allow.
    """

    codec: str
    dim: int
    pairs: int
    bits: float
    codes: float
    stored: float
    unbiased: bool
    shrinkage: float | None
    band: tuple[float, float] | None
    published: Published | None
    mse: float
    mse_se: float
    product: float
    product_se: float
    bias: float
    bias_se: float
    slope: float
    slope_se: float
    correlation: float
    failures: tuple[str, ...] = ()

    @property
    def shannon(self) -> float:
        """The least mean squared error possible at `bits`: 4^-bits."""
        return float(4.0**-self.bits)

    @property
    def over_shannon(self) -> float:
        """`mse` over the least possible at the all-in rate."""
        return self.mse / self.shannon

    @property
    def over_shannon_codes(self) -> float:
        """`mse` over 4^-codes."""
        return float(self.mse * 4.0**self.codes)


@dataclass(frozen=True)
class Skipped:
    """A codec that cannot do the head size, with its own reason."""

    codec: str
    dim: int
    reason: str


def code_bits(codec: Codec, dim: int) -> float:
    """Bits per element of the planes of integers: codes, without scales and norms."""
    planes = codec.planes(dim, "float16")
    return 8.0 * sum(p.nbytes for p in planes if mx.issubdtype(getattr(mx, p.dtype), mx.integer)) / dim


def lossy_codecs() -> list[str]:
    """Names of all lossy codecs that entry points offer."""
    names = [family + suffix for family in list_codecs() for suffix in load_plugin(GROUP, family).suffixes]
    return [name for name in names if not get_codec(name).exact]


def at_rates(names: Iterable[str], dims: Iterable[int], bits: Iterable[int], rotation: str = HADAMARD) -> list[str]:
    """The names of codecs whose `code_bits`, rounded (halves down), are among `bits` at one of `dims`."""
    dims, bits = list(dims), set(bits)
    return [name for name in names if bits & set(_rates(get_codec(name, 0, rotation), dims))]


def _rates(codec: Codec, dims: Iterable[int]) -> Iterator[int]:
    """Rounded rates at the head sizes that the codec can do."""
    for dim in dims:
        with contextlib.suppress(CodecError):
            yield math.ceil(code_bits(codec, dim) - 0.5)


def validate_codecs(
    names: Sequence[str],
    dim: int,
    pairs: int = 100_000,
    seed: int = 0,
    rotation: str = HADAMARD,
    scaling: str = LEAST_SQUARES,
) -> list[Measurement | Skipped]:
    """Measure codecs, all on the same pairs, and hold each against its theory.

    Of every codec: the planes must have the bits that it states; the mean squared error must be above the Shannon bound
    4^-b at the all-in rate b, within the codec's band, give or take 3 standard errors, and equal to `product` but for
    1%. Bounds that its paper proves must hold. The slope must be that of its stated shrinkage but for the rounding of a
    scale, 2^-8. A codec that states to be unbiased must have biases, additive and multiplicative, below 3 standard
    errors; for one that has not, four times as many other pairs and other seeds decide.

    Args:
        names: lossy codecs, each one for all heads.
        dim: D of the unit vectors.
        pairs: at least so many, for codecs that are not stated unbiased a quarter; a multiple of 4096 in the end.
        seed: of the vectors, and the first of the codecs' 16 seeds.
        rotation, scaling: as for `get_codec`.

    Returns:
        One entry a name, in order.

    Raises:
        CodecError: for unknown names, exact codecs and names with `+`.
    """
    make = partial(get_codec, rotation=rotation, scaling=scaling)
    skipped: dict[str, Skipped] = {}
    for name in names:
        codec = make(name)
        if codec.exact or "+" in name:
            kind = "exact" if codec.exact else "a codec for each KV head"
            raise CodecError(f"a codec held against theory must be lossy and one, got {name}, {kind}; leave it out")
        try:
            codec.planes(dim, "float16")
            if HEAD % (2 * _block(codec)):
                raise CodecError(f"its groups of {codec.group} tokens do not fill {HEAD // 2}")
        except CodecError as error:
            skipped[name] = Skipped(name, dim, str(error))
    able = [name for name in dict.fromkeys(names) if name not in skipped]
    unbiased = [name for name in able if make(name).unbiased]
    found = _measure(make, unbiased, dim, pairs, seed)
    again = [name for name in unbiased if _biases(found[name])]
    found |= _measure(make, again, dim, _SURE * pairs, seed + SEEDS)
    found |= _measure(make, [name for name in able if name not in unbiased], dim, -(-pairs // _SHARE), seed)
    checked = {name: replace(m, failures=tuple(_failures(m))) for name, m in found.items()}
    return [skipped[name] if name in skipped else checked[name] for name in names]


def _biases(m: Measurement) -> dict[str, str]:
    """The biases that an unbiased codec must not have but has, with their numbers."""
    biases = {"an additive bias": (m.bias, m.bias_se), "a multiplicative bias": (m.slope, m.slope_se)}
    return {
        name: f"{value:.3g} ± {error:.1g}"
        for name, (value, error) in biases.items()
        if m.unbiased and not abs(value) < SIGMAS * error
    }


def _failures(m: Measurement) -> Iterator[str]:
    """Everything that theory does not allow."""
    where, measured = f"{m.codec} at D = {m.dim}", f"{m.mse:.5g} ± {m.mse_se:.1g}"
    slack = SIGMAS * m.mse_se
    if not math.isclose(m.stored, m.bits, rel_tol=1e-9):
        yield f"{where} must store the {m.bits:.4g} bits per element that it states, got {m.stored:.4g}"
    if not m.mse >= m.shannon - slack:
        yield (
            f"{where} must have a mean squared error of at least 4^-{m.bits:.3f} = {m.shannon:.5g} (Shannon), "
            f"got {measured}: not all of its bytes are counted"
        )
    if m.band is not None and not m.band[0] - slack <= m.mse <= m.band[1] + slack:
        band = f"{m.band[0]:.5g} to {m.band[1]:.5g}"
        yield f"{where} must have a mean squared error within its band {band}, got {measured}"
    if not abs(m.product - m.mse) <= SIGMAS * m.product_se + _PRODUCT_SLACK * m.mse:
        yield (
            f"{where} must have D times the squared error of independent inner products equal to the mean squared "
            f"error {measured}, got {m.product:.5g} ± {m.product_se:.1g}: products are not those of decoded vectors"
        )
    said = m.published or Published("")
    for what, value, bound in (
        ("mean squared error", m.mse - slack, said.mse_bound),
        ("inner-product error times D", m.product - SIGMAS * m.product_se, said.product_bound),
    ):
        if bound is not None and not value <= bound:
            yield f"{where} must have a {what} of at most {bound:.5g} ({said.source}), got {value:.5g}"
    if m.shrinkage is not None:
        expected = -m.shrinkage * m.mse
        if not abs(m.slope - expected) <= SIGMAS * m.slope_se + _ROUNDING:
            yield (
                f"{where} must have a slope of inner products of 1 - {m.shrinkage:g} times its mean squared error "
                f"= {1 + expected:.5f}, got {1 + m.slope:.5f} ± {m.slope_se:.1g}: its scale is another"
            )
    for name, got in _biases(m).items():
        yield f"{where} must have {name} below {SIGMAS:g} standard errors, got {got} on {m.pairs} pairs"


def _measure(
    make: Callable[..., Codec], names: Sequence[str], dim: int, pairs: int, seed: int
) -> dict[str, Measurement]:
    """Measurements of the codecs `make(name, seed)`, which can do the head size; nothing checked."""
    heads = -(-pairs // (SEEDS * HEAD)) if names else 0
    sums: dict[str, list[Array]] = {name: [] for name in names}
    stored: dict[str, float] = {}
    most = max(1, _NUMBERS // (HEAD * dim))
    for i in range(SEEDS):
        draw = np.random.default_rng((seed, dim, i))
        for start in range(0, heads, most):
            first, keys, queries = _draw_pairs(draw, min(most, heads - start), dim)
            for name in names:
                found, stored[name] = _sums(make(name, seed + i), first, keys, queries)
                sums[name].append(found)
    return {
        name: _measurement(make(name, seed), dim, stored[name], np.concatenate(sums[name], axis=1)) for name in names
    }


def _draw_pairs(draw: np.random.Generator, heads: int, dim: int) -> tuple[mx.array, mx.array, mx.array]:
    """Keys for statistics, keys (float16) and queries (float32) `(1, H, L, D)`: token by token correlated."""

    def directions(tokens: int) -> mx.array:
        x = mx.array(draw.standard_normal((1, heads, tokens, dim), dtype=np.float32))
        return x / mx.linalg.norm(x, axis=-1, keepdims=True)

    first, x, z = directions(_FIT), directions(HEAD), directions(HEAD)
    z = z - x * mx.sum(x * z, axis=-1, keepdims=True)
    z = z / mx.linalg.norm(z, axis=-1, keepdims=True)
    rho = mx.array(draw.uniform(-1.0, 1.0, (1, heads, HEAD, 1)).astype(np.float32))
    return first.astype(mx.float16), x.astype(mx.float16), rho * x + mx.sqrt(1.0 - rho * rho) * z


def _block(codec: Codec) -> int:
    """Tokens of a block of products: whole groups."""
    return math.lcm(_BLOCK, codec.group)


def _in_blocks(planes: Planes, codec: Codec, dim: int) -> Planes:
    """Planes `(1, H, rows, W)` of heads as those of blocks `(1, H * blocks, rows of one, W)`."""
    tokens = {plane.name: plane.tokens for plane in codec.planes(dim, "float16")}
    size = _block(codec)
    return {name: plane.reshape(1, -1, size // tokens[name], plane.shape[-1]) for name, plane in planes.items()}


def _sums(codec: Codec, first: mx.array, keys: mx.array, queries: mx.array) -> tuple[Array, float]:
    """What `_SUMS` names by head `(sums, H)`, `product` as a mean over pairs, and the bits per element stored."""
    heads, dim = keys.shape[1], keys.shape[-1]
    size = _block(codec)
    blocks = HEAD // size
    statistics = codec.fit(first)
    planes = codec.encode(keys, statistics)
    exact = keys.astype(mx.float32)
    error = mx.sum(mx.square(codec.decode(planes, dim, mx.float32, statistics) - exact), axis=(0, 2, 3))
    turned = codec.transform_queries(queries, statistics).reshape(1, heads, blocks, size, -1)
    # The queries of a block, then those of the next one, which know nothing of its keys.
    turned = mx.concatenate([turned, mx.roll(turned, -1, 2)], axis=3).reshape(1, heads * blocks, 2 * size, -1)
    repeated = {name: mx.repeat(array, blocks, axis=1) for name, array in statistics.items()}
    own = codec.scores(turned, _in_blocks(planes, codec, dim), repeated).astype(mx.float32)
    pairs = queries.reshape(1, heads, blocks, size, dim)
    pairs = mx.concatenate([pairs, mx.roll(pairs, -1, 2)], axis=3).reshape(1, heads * blocks, 2 * size, dim)
    true = pairs @ exact.reshape(1, heads * blocks, size, dim).swapaxes(-1, -2)
    off = (own - true).reshape(heads, blocks, 2 * size, size)
    product = mx.mean(mx.square(off[:, :, size:]), axis=(1, 2, 3))
    diagonal = mx.diagonal(off[:, :, :size], 0, -2, -1).reshape(heads, HEAD)
    mx.eval(error, product, diagonal)
    t = np.array(mx.sum(queries * exact, axis=-1), dtype=np.float64)[0]
    d = np.array(diagonal, dtype=np.float64)
    moments = [part.sum(axis=1) for part in (t, t * t, d, t * d, d * d)]
    stored = 8.0 * sum(plane.nbytes for plane in planes.values()) / (heads * HEAD * dim)
    return np.stack([*moments, *(np.array(x, dtype=np.float64) for x in (error, product))]), stored


def _measurement(codec: Codec, dim: int, stored: float, sums: Array) -> Measurement:
    """From sums `(sums, heads)`, seed after seed: least squares over all pairs, errors of the estimates by scatter."""
    by_head = dict(zip(_SUMS, sums, strict=True))
    heads = sums.shape[1]
    n = heads * HEAD
    t, tt, d, td, dd = (float(by_head[name].sum()) / n for name in ("t", "tt", "d", "td", "dd"))
    var_t, covariance, var_d = tt - t * t, td - t * d, dd - d * d
    slope = covariance / var_t
    bias = d - slope * t
    residual = by_head["d"] - bias * HEAD - slope * by_head["t"]
    moment = by_head["td"] - bias * by_head["t"] - slope * by_head["tt"]
    mse, product = by_head["error"] / HEAD, dim * by_head["product"]
    return Measurement(
        codec=codec.name,
        dim=dim,
        pairs=n,
        bits=codec.bits_per_element(dim),
        codes=code_bits(codec, dim),
        stored=stored,
        unbiased=codec.unbiased,
        shrinkage=codec.shrinkage,
        band=codec.expected_mse(dim),
        published=codec.published(dim),
        mse=float(mse.mean()),
        mse_se=_standard_error(mse),
        product=float(product.mean()),
        product_se=_standard_error(product - mse),
        bias=bias,
        bias_se=_standard_error((residual * tt - moment * t) / (HEAD * var_t)),
        slope=slope,
        slope_se=_standard_error((moment - t * residual) / (HEAD * var_t)),
        correlation=(var_t + covariance) / math.sqrt(var_t * (var_t + 2.0 * covariance + var_d)),
    )


def _standard_error(values: Array) -> float:
    """Of the mean of numbers by head, seed after seed.

    Of unbiased sketches of a residual each seed has a bias of some 1e-4 of its own, zero on average over seeds: on
    millions of pairs it is the seeds that are too few.
    """
    seeds = values.reshape(SEEDS, -1).mean(axis=1)
    return max(float(np.std(x, ddof=1)) / math.sqrt(x.size) for x in (values, seeds))
