"""Codecs against theory: error, inner products and bias on random unit vectors, and the bands they must lie in.

Keys x are uniform on the unit sphere, queries are y = rho x + sqrt(1 - rho^2) z with z uniform on the unit vectors
orthogonal to x and rho uniform on [-1, 1], so that <y, x> = rho is known and a multiplicative bias is a slope. Within a
block of keys and queries the pairs off the diagonal are independent; they give the inner-product error as the
TurboQuant paper (arXiv 2504.19874) states it. Products go through the codec's own estimator, as in attention.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from .codebooks import Array
from .codecs import GROUP, Codec, Planes, get_codec, list_codecs
from .errors import CodecError
from .plugins import load_plugin

PAPER = "TurboQuant, arXiv 2504.19874, theorems 1 and 2"
PAPER_MSE = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
PAPER_PRODUCT = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}  # times 1 / D
SEEDS = 16  # the codec's seeds that the pairs are spread over; standard errors are those of their means
SIGMAS = 3.0

_TOKENS = 256  # of one head
_FIT = 128  # first tokens of a head, which statistics are fitted to
_HEADS = 32  # of one call: 8192 tokens
_BLOCK = 16  # keys and queries of one block of products
_SUMS = ("pairs", "t", "tt", "d", "td", "dd", "error", "product", "products")  # t = <y, x>, d = <y, x^> - <y, x>


@dataclass(frozen=True)
class Measurement:
    """One codec on random unit vectors; every `_se` is a standard error over the codec's seeds.

    Attributes:
        codec, dim, pairs: what was measured, on how many pairs.
        bits: all-in bits per element, of float16 input.
        codes: bits per element without scales and norms: those of the planes of integers.
        unbiased, band: what the codec states.
        mse: E ||x - x^||^2.
        product: D E (<y, x^> - <y, x>)^2 for independent x and y.
        bias: E (<y, x^> - <y, x>).
        slope: of <y, x^> over <y, x>, less 1: the multiplicative bias.
        correlation: of <y, x^> and <y, x>.
        failures: one sentence for everything that theory does not allow.
    """

    codec: str
    dim: int
    pairs: int
    bits: float
    codes: float
    unbiased: bool
    band: tuple[float, float] | None
    mse: float
    mse_se: float
    product: float
    bias: float
    bias_se: float
    slope: float
    slope_se: float
    correlation: float
    failures: tuple[str, ...] = ()

    @property
    def over_shannon(self) -> float:
        """`mse` over 4^-bits, the least possible at the all-in rate."""
        return float(self.mse * 4.0**self.bits)

    @property
    def over_shannon_codes(self) -> float:
        """`mse` over 4^-codes."""
        return float(self.mse * 4.0**self.codes)

    @property
    def paper_mse(self) -> float | None:
        """The error that the TurboQuant paper states for as many bits of codes."""
        return None if self.unbiased else PAPER_MSE.get(_whole(self.codes))

    @property
    def paper_product(self) -> float | None:
        """The inner-product error, times D, that the paper states for its unbiased estimator at as many bits."""
        return PAPER_PRODUCT.get(_whole(self.codes)) if self.unbiased else None


@dataclass(frozen=True)
class Skipped:
    """A codec that cannot do the head size, with its own reason."""

    codec: str
    dim: int
    reason: str


def _whole(bits: float) -> int:
    return round(bits) if abs(bits - round(bits)) < 1e-9 else 0


def code_bits(codec: Codec, dim: int) -> float:
    """Bits per element of the planes of integers: codes, without scales and norms."""
    planes = codec.planes(dim, "float16")
    return 8.0 * sum(p.nbytes for p in planes if mx.issubdtype(getattr(mx, p.dtype), mx.integer)) / dim


def lossy_codecs() -> list[str]:
    """Names of all lossy codecs that entry points offer."""
    names = [family + suffix for family in list_codecs() for suffix in load_plugin(GROUP, family).suffixes]
    return [name for name in names if not get_codec(name).exact]


def at_rates(names: Iterable[str], dims: Iterable[int], bits: Iterable[int]) -> list[str]:
    """The names of codecs whose `code_bits`, rounded (halves down), are among `bits` at one of `dims`."""
    dims, bits = list(dims), set(bits)
    return [name for name in names if bits & set(_rates(get_codec(name), dims))]


def _rates(codec: Codec, dims: Iterable[int]) -> Iterator[int]:
    """Rounded rates at the head sizes that the codec can do."""
    for dim in dims:
        with contextlib.suppress(CodecError):
            yield math.ceil(code_bits(codec, dim) - 0.5)


def validate_codecs(names: Sequence[str], dim: int, pairs: int, seed: int = 0) -> list[Measurement | Skipped]:
    """Measure codecs, all on the same pairs, and hold each against its theory.

    The mean squared error must lie within the codec's band, give or take 3 standard errors, and above the Shannon bound
    4^-b at the all-in rate b. The biases of a codec that states to be unbiased must be below 3 standard errors; one
    that is not is measured again on other pairs and seeds, and fails if it is not there either.

    Args:
        names: lossy codecs.
        dim: D of the unit vectors.
        pairs: at least so many, a multiple of 4096 in the end.
        seed: of the vectors, and the first of the codecs' 16 seeds.

    Returns:
        One entry a name, in order. Allocates some hundred bytes a name and about 64 MB of vectors.

    Raises:
        CodecError: for unknown names and exact codecs.
    """
    able, skipped = [], {}
    for name in names:
        codec = get_codec(name)
        if codec.exact:
            raise CodecError(f"a codec held against theory must be lossy, got {name}, which is exact; leave it out")
        try:
            codec.planes(dim, "float16")
            able.append(name)
        except CodecError as error:
            skipped[name] = Skipped(name, dim, str(error))
    found = {m.codec: m for m in _measure(able, dim, pairs, seed)}
    again = [
        m.codec for m in found.values() if m.unbiased and (_biased(m.bias, m.bias_se) or _biased(m.slope, m.slope_se))
    ]
    second = {m.codec: m for m in _measure(again, dim, pairs, seed + SEEDS)}
    checked = {name: _with_failures(m, second.get(name)) for name, m in found.items()}
    return [skipped[name] if name in skipped else checked[name] for name in names]


def _biased(value: float, standard_error: float) -> bool:
    return not abs(value) < SIGMAS * standard_error


def _suspect(m: Measurement) -> bool:
    return _biased(m.bias, m.bias_se) or _biased(m.slope, m.slope_se)


def _with_failures(m: Measurement, second: Measurement | None) -> Measurement:
    where, measured = f"{m.codec} at D = {m.dim}", f"{m.mse:.5g} ± {m.mse_se:.1g}"
    slack = SIGMAS * m.mse_se
    found = []
    if not m.mse >= 4.0**-m.bits - slack:
        found.append(
            f"{where} must have a mean squared error of at least 4^-{m.bits:.3f} = {4.0**-m.bits:.5g} (Shannon), "
            f"got {measured}: not all of its bytes are counted"
        )
    if m.band is not None and not m.band[0] - slack <= m.mse <= m.band[1] + slack:
        found.append(
            f"{where} must have a mean squared error within its band {m.band[0]:.5g} to {m.band[1]:.5g}, got {measured}"
        )
    if second is not None:
        biases = {
            "an additive bias": ((m.bias, m.bias_se), (second.bias, second.bias_se)),
            "a multiplicative bias": ((m.slope, m.slope_se), (second.slope, second.slope_se)),
        }
        for name, draws in biases.items():
            if all(_biased(*draw) for draw in draws):
                got = " and ".join(f"{value:.3g} ± {error:.1g}" for value, error in draws)
                found.append(f"{where} must have {name} below {SIGMAS:g} standard errors, got {got} in two draws")
    return replace(m, failures=tuple(found))


def _measure(names: Sequence[str], dim: int, pairs: int, seed: int) -> Iterator[Measurement]:
    """Measurements of codecs that can do the head size, nothing checked."""
    if not names:
        return
    heads = -(-pairs // (SEEDS * _TOKENS))
    sums = {name: np.zeros((SEEDS, len(_SUMS))) for name in names}
    for i in range(SEEDS):
        draw = np.random.default_rng((seed, dim, i))
        for start in range(0, heads, _HEADS):
            keys, queries = _draw_pairs(draw, min(_HEADS, heads - start), dim)
            for name in names:
                sums[name][i] += _sums(get_codec(name, seed + i), keys, queries)
    for name in names:
        yield _measurement(get_codec(name, seed), dim, dict(zip(_SUMS, sums[name].T, strict=True)))


def _draw_pairs(draw: np.random.Generator, heads: int, dim: int) -> tuple[mx.array, mx.array]:
    """Keys (float16) and queries (float32) `(1, H, L, D)`, the pairs on the diagonal correlated."""
    shape = (1, heads, _TOKENS, dim)
    x, z = (mx.array(draw.standard_normal(shape, dtype=np.float32)) for _ in range(2))
    x = x / mx.linalg.norm(x, axis=-1, keepdims=True)
    z = z - x * mx.sum(x * z, axis=-1, keepdims=True)
    z = z / mx.linalg.norm(z, axis=-1, keepdims=True)
    rho = mx.array(draw.uniform(-1.0, 1.0, (*shape[:-1], 1)).astype(np.float32))
    return x.astype(mx.float16), rho * x + mx.sqrt(1.0 - rho * rho) * z


def _cut(codec: Codec, planes: Planes, dim: int, start: int, stop: int) -> Planes:
    """The rows of the tokens from `start` to `stop`."""
    tokens = {plane.name: plane.tokens for plane in codec.planes(dim, "float16")}
    return {name: plane[:, :, start // tokens[name] : stop // tokens[name]] for name, plane in planes.items()}


def _sums(codec: Codec, keys: mx.array, queries: mx.array) -> Array:
    """What `_SUMS` names, of one draw."""
    dim = keys.shape[-1]
    statistics = codec.fit(keys[:, :, :_FIT])
    planes = codec.encode(keys, statistics)
    exact = keys.astype(mx.float32)
    error = mx.sum(mx.square(codec.decode(planes, dim, mx.float32, statistics) - exact), axis=-1)
    turned = codec.transform_queries(queries, statistics)
    size = math.lcm(_BLOCK, codec.group)
    products, diagonals = [], []
    for start in range(0, _TOKENS, size):
        stop = start + size
        true = queries[:, :, start:stop] @ exact[:, :, start:stop].swapaxes(-1, -2)
        own = codec.scores(turned[:, :, start:stop], _cut(codec, planes, dim, start, stop), statistics)
        off = own.astype(mx.float32) - true
        squares = mx.sum(mx.square(off), axis=(-1, -2)) - mx.sum(mx.square(mx.diagonal(off, 0, -2, -1)), axis=-1)
        products.append(squares)
        diagonals.append(mx.stack([mx.diagonal(true, 0, -2, -1), mx.diagonal(off, 0, -2, -1)]))
    product, diagonal = mx.stack(products), mx.concatenate(diagonals, axis=-1)
    mx.eval(error, product, diagonal)
    t, d = np.array(diagonal, dtype=np.float64).reshape(2, -1)
    moments = [t.size, t.sum(), t @ t, d.sum(), t @ d, d @ d]
    whole = [np.array(a, dtype=np.float64).sum() for a in (error, product)]
    return np.array([*moments, *whole, t.size * (size - 1)])


def _measurement(codec: Codec, dim: int, sums: dict[str, Array]) -> Measurement:
    """From sums `(SEEDS,)`."""
    n = sums["pairs"]
    mean_t, mean_d = sums["t"] / n, sums["d"] / n
    spread = sums["tt"] / n - mean_t**2
    slope = (sums["td"] / n - mean_t * mean_d) / spread
    bias = mean_d - slope * mean_t  # at <y, x> = 0
    mse = sums["error"] / n
    total = {name: float(values.sum() / n.sum()) for name, values in sums.items()}
    var_t = total["tt"] - total["t"] ** 2
    covariance = total["td"] - total["t"] * total["d"]
    var_d = total["dd"] - total["d"] ** 2
    return Measurement(
        codec=codec.name,
        dim=dim,
        pairs=int(n.sum()),
        bits=codec.bits_per_element(dim),
        codes=code_bits(codec, dim),
        unbiased=codec.unbiased,
        band=codec.expected_mse(dim),
        mse=float(mse.mean()),
        mse_se=_standard_error(mse),
        product=dim * total["product"] / total["products"],
        bias=float(bias.mean()),
        bias_se=_standard_error(bias),
        slope=float(slope.mean()),
        slope_se=_standard_error(slope),
        correlation=(var_t + covariance) / math.sqrt(var_t * (var_t + 2.0 * covariance + var_d)),
    )


def _standard_error(values: Array) -> float:
    """Of the mean."""
    return float(np.std(values, ddof=1)) / math.sqrt(values.size)
