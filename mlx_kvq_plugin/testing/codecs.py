"""The contract of codecs: checks of a codec, a head size and a dtype, and a pytest class that runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from ..checking import FAIL, REFUSED, check_model
from ..codecs import Codec, Plane, get_codec
from .models import tiny_llama

ROWS, HEADS = 2, 2
DTYPES = ("float32", "float16", "bfloat16")
# Products are rounded as their inputs are: relative errors, of root mean squares.
PRODUCT_ERROR = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


def tokens(dim: int, length: int, dtype: str = "float32", seed: int = 1) -> mx.array:
    """Gaussian tokens `(2, 2, length, dim)`."""
    x = np.random.default_rng(seed).normal(size=(ROWS, HEADS, length, dim)).astype(np.float32)
    return mx.array(x).astype(getattr(mx, dtype))


def as_float64(x: mx.array) -> Any:
    """The numbers of an array as NumPy's float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def raw(planes: Mapping[str, mx.array]) -> dict[str, Any]:
    """The bytes of each plane, one row a token."""
    return {name: np.array(mx.contiguous(plane).view(mx.uint8)) for name, plane in planes.items()}


def assert_same_bytes(found: Mapping[str, mx.array], wanted: Mapping[str, mx.array]) -> None:
    """Equal planes, to the bit."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(raw(found)[name], raw(wanted)[name], err_msg=name)


def shape_of(plane: Plane, length: int) -> tuple[int, ...]:
    """The shape of a plane of `length` tokens of `tokens`; heads of codecs for some heads are fewer."""
    return ROWS, round(HEADS * plane.share), -(-length // plane.tokens), plane.width


def check_declared_planes(codec: Codec, dim: int, dtype: str) -> None:
    """`planes` declares what `encode` stores: names, dtypes, shapes; and with it the bytes."""
    declared = codec.planes(dim, dtype)
    names = [plane.name for plane in declared]
    assert len(set(names)) == len(names) and not any("." in name for name in names), "names of planes"
    assert any(plane.tokens == 1 for plane in declared), "one plane must have a row for every token"
    x = tokens(dim, 2 * codec.group + 1, dtype)
    planes = codec.encode(x, codec.fit(x))
    assert set(planes) == set(names)
    for plane in declared:
        assert planes[plane.name].dtype == getattr(mx, plane.dtype), plane.name
        assert planes[plane.name].shape == shape_of(plane, x.shape[2]), plane.name
    whole = 16 * codec.group
    x = tokens(dim, whole, dtype)
    held = sum(plane.nbytes for plane in codec.encode(x, codec.fit(x)).values())
    assert held == pytest.approx(ROWS * HEADS * whole * dim * codec.bits_per_element(dim, dtype) / 8)


def check_lengths(codec: Codec, dim: int, dtype: str) -> None:
    """Any number of tokens comes back, none too, in the dtype that is asked for."""
    x = tokens(dim, 9, dtype)
    statistics = codec.fit(x)
    for length in (0, 1, 7):
        decoded = codec.decode(codec.encode(x[:, :, :length], statistics), dim, x.dtype, statistics)
        assert decoded.dtype == x.dtype and decoded.shape == (ROWS, HEADS, length, dim)
        assert bool(mx.all(mx.isfinite(decoded)))


def check_pieces(codec: Codec, dim: int, dtype: str) -> None:
    """Encoding in pieces gives the bytes of encoding at once; pieces end at groups."""
    cuts = [0, 1, 8, 13] if codec.group == 1 else [0, codec.group, 3 * codec.group, 3 * codec.group + 5]
    x = tokens(dim, cuts[-1], dtype)
    statistics = codec.fit(x)
    whole = codec.encode(x, statistics)
    pieces = [codec.encode(x[:, :, a:b], statistics) for a, b in pairwise(cuts)]
    joined = {name: mx.concatenate([piece[name] for piece in pieces], axis=2) for name in whole}
    assert_same_bytes(joined, whole)


def check_neighbours(codec: Codec, dim: int, dtype: str) -> None:
    """Codes of a token do not depend on its neighbours; or, where tokens are encoded in groups, on other groups."""
    count = 17 if codec.group == 1 else 5
    x = tokens(dim, count * codec.group, dtype)
    statistics = codec.fit(x)
    whole = codec.encode(x, statistics)
    rng, last = np.random.default_rng(3), count - 1
    for chosen in [rng.permutation(count), rng.permutation(count)[:3], np.array([last - 1]), np.array([1, 1, last])]:

        def rows(each: int, chosen: Any = chosen) -> mx.array:
            return mx.array((chosen[:, None] * each + np.arange(each)).reshape(-1))

        alone = codec.encode(x[:, :, rows(codec.group)], statistics)
        shares = {plane.name: codec.group // plane.tokens for plane in codec.planes(dim, dtype)}
        assert_same_bytes(alone, {name: plane[:, :, rows(shares[name])] for name, plane in whole.items()})


def check_rows_and_heads(codec: Codec, dim: int, dtype: str, heads: bool = True) -> None:
    """Sequences of a batch, and with `heads` KV heads, are encoded one by one, their statistics too."""
    x = tokens(dim, 5 + codec.group, dtype)
    statistics = codec.fit(x)
    whole = codec.encode(x, statistics)
    for array in statistics.values():
        assert isinstance(array, mx.array) and array.shape[0] == ROWS
    cuts = [slice(h, h + 1) for h in range(HEADS)] if heads else [slice(0, HEADS)]
    for b, h in ((b, h) for b in range(ROWS) for h in cuts):
        cut = np.s_[b : b + 1, h]
        part = codec.fit(x[cut])
        assert_same_bytes(part, {name: array[cut] for name, array in statistics.items()})
        assert_same_bytes(codec.encode(x[cut], part), {name: plane[cut] for name, plane in whole.items()})


def check_determinism(codec: Codec, dim: int, dtype: str) -> None:
    """An equal codec, also one made from its JSON, gives equal bytes; codecs are hashable and equal by their fields."""
    x = tokens(dim, 4 + codec.group, dtype)
    wanted = codec.encode(x, codec.fit(x))
    again = replace(codec)
    assert codec == again and hash(codec) == hash(again)
    assert_same_bytes(again.encode(x, again.fit(x)), wanted)


def check_json(codec: Codec) -> None:
    """Files name the codec, and find it again by that name."""
    found = Codec.from_json(codec.to_json())
    assert found == codec and get_codec(codec.name, codec.seed) == codec


def check_reconstruction(codec: Codec, dim: int, dtype: str) -> None:
    """What comes back is nearer to the tokens than nothing; exact codecs give them back, bit for bit."""
    x = tokens(dim, 64 * codec.group, dtype)
    statistics = codec.fit(x)
    decoded = codec.decode(codec.encode(x, statistics), dim, x.dtype, statistics)
    if codec.exact:
        assert mx.array_equal(decoded, x)
    a, b = as_float64(x), as_float64(decoded)
    error = float(np.sum((a - b) ** 2) / np.sum(a * a))
    assert error < 1, f"the squared error is {error:.2f} of the tokens' own size"


def check_sizes(codec: Codec, dim: int, dtype: str) -> None:
    """Zeros, tiny and large tokens decode to finite numbers; zeros to zeros."""
    zeros = mx.zeros((ROWS, HEADS, 2 * codec.group, dim), dtype=getattr(mx, dtype))
    statistics = codec.fit(zeros)
    decoded = codec.decode(codec.encode(zeros, statistics), dim, zeros.dtype, statistics)
    assert bool(mx.all(decoded == 0))
    for size in (1e-6, 1e3):
        x = (tokens(dim, 2 * codec.group) * size).astype(getattr(mx, dtype))
        statistics = codec.fit(x)
        decoded = codec.decode(codec.encode(x, statistics), dim, mx.float32, statistics)
        assert bool(mx.all(mx.isfinite(decoded))), f"tokens of size {size:g}"


def check_products(codec: Codec, dim: int, dtype: str) -> None:
    """Scores are inner products with the decoded keys, weighted sums are sums of the decoded values."""
    x = tokens(dim, 21, dtype) * mx.array(np.geomspace(3, 0.1, dim).astype(np.float32)).astype(getattr(mx, dtype))
    queries = (tokens(dim, 3, seed=2) * 0.3).astype(x.dtype)
    weights = (tokens(21, 3, seed=3) * 0.3).astype(x.dtype)
    statistics = codec.fit(x)
    planes = codec.encode(x, statistics)
    decoded = as_float64(codec.decode(planes, dim, mx.float32, statistics))
    scores = codec.scores(codec.transform_queries(queries, statistics), planes, statistics)
    _near(scores, as_float64(queries) @ decoded.swapaxes(-1, -2), PRODUCT_ERROR[dtype], "scores")
    if codec.values:
        output = codec.untransform_output(codec.weighted_sum(weights, planes, dim, statistics), statistics)
        _near(output, as_float64(weights) @ decoded, PRODUCT_ERROR[dtype], "weighted sums")


def _near(found: mx.array, wanted: Any, error: float, what: str) -> None:
    lost = np.sqrt(np.mean((as_float64(found) - wanted) ** 2)) / np.sqrt(np.mean(wanted**2))
    assert found.shape == wanted.shape and lost < error, f"{what} differ by {lost:.2e} (limit {error:.0e})"


def check_no_tokens(codec: Codec, dim: int, dtype: str) -> None:
    """Products with no tokens are empty, and zero."""
    x = tokens(dim, 4 + codec.group, dtype)
    statistics = codec.fit(x)
    planes = codec.encode(x[:, :, :0], statistics)
    scores = codec.scores(codec.transform_queries(x[:, :, :4], statistics), planes, statistics)
    assert scores.shape == (ROWS, HEADS, 4, 0)
    if codec.values:
        output = codec.untransform_output(codec.weighted_sum(scores, planes, dim, statistics), statistics)
        assert output.shape == (ROWS, HEADS, 4, dim) and bool(mx.all(output == 0))


CHECKS = {
    "declared_planes": check_declared_planes,
    "lengths": check_lengths,
    "pieces": check_pieces,
    "neighbours": check_neighbours,
    "rows_and_heads": check_rows_and_heads,
    "determinism": check_determinism,
    "reconstruction": check_reconstruction,
    "sizes": check_sizes,
    "products": check_products,
    "no_tokens": check_no_tokens,
}


class CodecSuite:
    """The contract of one codec; subclass it as `Test...` and name the codec.

    Attributes:
        name: what `get_codec` finds the codec by.
        dims: head sizes; the first is that of the model that the codec is used in.
        scheme: of the model; empty for the codec alone on keys, with its partner on values.
        max_kl: nats a token, the mean divergence from mlx-lm's caches that the codec may cost on a random tiny model.
    """

    name: ClassVar[str]
    dims: ClassVar[Sequence[int]] = (64, 128)
    scheme: ClassVar[str] = ""
    max_kl: ClassVar[float] = 0.5

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every check at every head size; in all dtypes at the first one."""
        if metafunc.function.__name__ == "test_contract":
            cases = [(check, dim, "float32") for check in CHECKS for dim in self.dims]
            cases += [(check, self.dims[0], dtype) for check in CHECKS for dtype in DTYPES[1:]]
            metafunc.parametrize(("check", "dim", "dtype"), cases)

    @pytest.fixture(autouse=True)
    def plain_arithmetic(self) -> Iterator[None]:
        """Without compiled kernels, whose compilation takes seconds each on a CPU."""
        mx.disable_compile()
        yield
        mx.enable_compile()

    def test_contract(self, check: str, dim: int, dtype: str) -> None:
        """One check of this module."""
        CHECKS[check](get_codec(self.name), dim, dtype)

    def test_json(self) -> None:
        """Files find the codec again."""
        check_json(get_codec(self.name))

    def test_in_a_model(self) -> None:
        """In caches of a tiny model: prefill, steps, batches, trims, files, copies, threads, bytes (`kvq check`)."""
        codec = get_codec(self.name)
        scheme = self.scheme or (self.name if codec.values else f"k={self.name},v={codec.partner}")
        report = check_model(tiny_llama(self.dims[0]), schemes=[scheme], tokens=160, max_kl=self.max_kl)
        own = [check for check in report.checks if check.scheme != "identity"]
        assert report.passed, str(report)
        assert not any(check.status in (REFUSED, FAIL) for check in own), str(report)
