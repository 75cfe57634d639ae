"""What theory says of codecs: right ones pass, and each way of being wrong by a little is told from the others."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq_plugin import theory
from mlx_kvq_plugin.codecs import Codec, get_codec
from mlx_kvq_plugin.codecs.kivi import KIVI
from mlx_kvq_plugin.codecs.polar import Polar
from mlx_kvq_plugin.codecs.qjl import QJL
from mlx_kvq_plugin.codecs.scalar import nearest_codes, unpacked_levels
from mlx_kvq_plugin.codecs.turboquant import TurboQuant
from mlx_kvq_plugin.codecs.turboquant_prod import TurboQuantProd
from mlx_kvq_plugin.errors import CodecError
from mlx_kvq_plugin.packing import pack
from mlx_kvq_plugin.rotation import rotate
from mlx_kvq_plugin.theory import Measurement, Skipped, at_rates, code_bits, lossy_codecs, validate_codecs

PAIRS = 8192  # 2 heads for each of the 16 seeds
DEFAULT = at_rates(lossy_codecs(), [64, 128, 256], [1, 2, 3, 4])


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic() -> Iterator[None]:
    """Without compiled kernels, whose compilation takes seconds each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch):
    """`measure(kind, dim=64)` is a codec class held against theory in place of whatever its name means."""

    def measure(kind: type[Codec], dim: int = 64, pairs: int = PAIRS) -> Measurement:
        monkeypatch.setattr(theory, "get_codec", lambda name, seed=0, rotation="", scaling="": kind(seed))
        (found,) = validate_codecs(["it"], dim, pairs)
        assert isinstance(found, Measurement)
        return found

    return measure


# ---- codecs as they are ----------------------------------------------------------------------------------------------


def test_every_codec_is_within_theory() -> None:
    found = validate_codecs(lossy_codecs(), 64, PAIRS)
    assert [m.codec for m in found] == lossy_codecs()
    for m in found:
        assert isinstance(m, Measurement)
        assert not m.failures
        assert m.band is not None and m.band[1] < 1.04 * m.band[0]  # no band is loose
        assert m.pairs == (8192 if m.unbiased else 4096)
    assert {m.codec for m in found if m.unbiased} == {*(f"qjl{b}" for b in "1234"), *(f"tqprod{b}" for b in "234")}


@pytest.mark.parametrize("rotation", ["hadamard2", "dense"])
def test_other_rotations_and_head_sizes_are_within_theory(rotation: str) -> None:
    for m in validate_codecs(["tq2", "tq2.5", "rvq2", "tqprod3", "qjl1", "polar4", "grouped3"], 80, PAIRS, 3, rotation):
        assert isinstance(m, Measurement) and not m.failures


@pytest.mark.parametrize(("scaling", "shrinkage"), [("norm", 0.5), ("unbiased", 0.0)])
def test_other_scalings_are_within_theory(scaling: str, shrinkage: float) -> None:
    for m in validate_codecs(["tq1", "tq2", "tq4", "tq2.5", "rvq1"], 64, PAIRS, scaling=scaling):
        assert isinstance(m, Measurement) and not m.failures
        assert m.shrinkage == shrinkage
        assert m.slope == pytest.approx(-shrinkage * m.mse, abs=0.006)
        (least,) = validate_codecs([m.codec], 64, 4096)
        assert isinstance(least, Measurement) and least.band is not None
        assert m.band is not None and m.band[0] > least.band[0] and m.mse > least.mse


def test_measurements_are_those_of_a_plain_computation() -> None:
    """In NumPy, from decoded vectors alone, on other pairs."""
    dim, count = 64, 6000
    draw = np.random.default_rng(5)
    x, z = draw.standard_normal((2, count, dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    z -= x * np.sum(x * z, axis=1, keepdims=True)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    rho = draw.uniform(-1, 1, (count, 1))
    y = rho * x + np.sqrt(1 - rho**2) * z
    for name in ("tq2", "qjl1"):
        codec = get_codec(name)
        decoded = codec.decode(codec.encode(x), dim).astype(np.float64)
        (m,) = validate_codecs([name], dim, 4 * PAIRS)
        assert isinstance(m, Measurement)
        assert m.mse == pytest.approx(np.mean(np.sum((decoded - x) ** 2, axis=1)), rel=0.02)
        estimate = np.sum(y * decoded, axis=1)
        assert m.correlation == pytest.approx(np.corrcoef(estimate, rho[:, 0])[0, 1], abs=1e-3)
        slope, bias = np.polyfit(rho[:, 0], estimate, 1)
        assert m.slope == pytest.approx(slope - 1, abs=0.006)
        assert m.bias == pytest.approx(bias, abs=0.006)
        off = np.roll(y, 1, axis=0)
        product = dim * np.mean((np.sum(off * decoded, axis=1) - np.sum(off * x, axis=1)) ** 2)
        assert m.product == pytest.approx(product, rel=0.1)


def test_the_slope_of_one_bit_is_two_over_pi() -> None:
    """Section 3.2 of the paper: the bias that its unbiased estimator is for."""
    (m,) = validate_codecs(["tq1"], 128, 4 * PAIRS)
    assert isinstance(m, Measurement)
    assert 1 + m.slope == pytest.approx(2 / math.pi, abs=0.005)


def test_standard_errors_are_those_of_repeated_measurements() -> None:
    """The scatter of 16 draws is what one draw says; so few tell it to 18%."""
    found = [validate_codecs(["tqprod2"], 16, 4096, 100 * i)[0] for i in range(16)]
    for name in ("mse", "bias", "slope"):
        values = [getattr(m, name) for m in found]
        stated = np.sqrt(np.mean([getattr(m, f"{name}_se") ** 2 for m in found]))
        assert np.std(values, ddof=1) == pytest.approx(stated, rel=0.5)


def test_what_scatters_by_seed_is_told_by_the_seeds() -> None:
    by_seed = np.random.default_rng(0).standard_normal(theory.SEEDS)
    noise = 0.01 * np.random.default_rng(1).standard_normal(theory.SEEDS * 500)
    error = theory._standard_error(np.repeat(by_seed, 500) + noise)
    assert error == pytest.approx(np.std(by_seed, ddof=1) / 4, rel=0.01)
    shuffled = np.random.default_rng(2).permutation(np.repeat(by_seed, 500))
    assert theory._standard_error(shuffled) < 0.1 * error


def test_equal_arguments_give_equal_measurements() -> None:
    names = ["tq2", "qjl1"]
    assert validate_codecs(names, 32, 4096) == validate_codecs(names, 32, 4096)
    assert validate_codecs(names, 32, 4096, 1) != validate_codecs(names, 32, 4096)
    alone = validate_codecs(["qjl1"], 32, 4096)
    assert alone == validate_codecs(names, 32, 4096)[1:]


# ---- what papers say -------------------------------------------------------------------------------------------------


def test_papers_are_quoted() -> None:
    said = {name: get_codec(name).published(128) for name in DEFAULT}
    for bits, mse in {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}.items():
        tq = said[f"tq{bits}"]
        assert tq is not None and tq.source == "TurboQuant, arXiv 2504.19874, theorem 1"
        assert (tq.mse, tq.product, tq.product_bound) == (mse, None, None)
        assert tq.mse_bound == pytest.approx(math.sqrt(3) * math.pi / 2 * 4**-bits)
    for bits, product in {2: 0.56, 3: 0.18, 4: 0.047}.items():
        prod = said[f"tqprod{bits}"]
        assert prod is not None and prod.source == "TurboQuant, arXiv 2504.19874, theorem 2"
        assert (prod.mse, prod.product, prod.mse_bound) == (None, product, None)
        assert prod.product_bound == pytest.approx(math.sqrt(3) * math.pi**2 * 4**-bits)
    assert said["rvq1"] == said["tq2"] and said["rvq2"] == said["tq4"]
    assert said["qjl2"] is not None and said["qjl2"].product_bound == pytest.approx(math.pi / 4)
    assert said["qjl1"] is not None and said["qjl1"].product == 1.57
    assert said["tq2.5"] is not None
    assert said["tq2.5"].mse_bound == pytest.approx(math.sqrt(3) * math.pi / 4 * (4**-2 + 4**-3))
    assert {name for name in DEFAULT if said[name] is None} == {
        name for name in DEFAULT if name.startswith(("affine", "grouped", "kivi", "polar", "tcq"))
    }


def test_the_shannon_bound_is_that_of_all_bytes() -> None:
    (m,) = validate_codecs(["tq2"], 64, 4096)
    assert isinstance(m, Measurement)
    assert (m.bits, m.codes, m.stored) == (2.25, 2.0, 2.25)
    assert m.shannon == 4**-2.25
    assert m.over_shannon == pytest.approx(m.mse * 4**2.25)
    assert m.over_shannon_codes == pytest.approx(m.mse * 16)
    assert json.loads(json.dumps(asdict(m)))["published"]["mse"] == 0.117


def test_codes_are_the_planes_of_integers() -> None:
    bits = {name: code_bits(get_codec(name), 64) for name in ("tq3", "rvq2", "tqprod3", "qjl2", "kivi4", "grouped2")}
    assert bits == {"tq3": 3, "rvq2": 4, "tqprod3": 3, "qjl2": 2, "kivi4": 4, "grouped2": 2.5}


def test_codecs_are_chosen_by_their_rounded_rates() -> None:
    assert at_rates(["tq1", "tq2", "rvq1", "grouped2", "tq2.5", "polar4"], [64], [2]) == [
        "tq2",
        "rvq1",
        "grouped2",
        "tq2.5",
    ]
    assert at_rates(["polar4", "tq2.5"], [64, 128], [3]) == ["polar4"]
    assert at_rates(["tq2"], [6, 72], [2]) == [] and at_rates(["tq2"], [72], [2], "dense") == ["tq2"]


# ---- codecs that are wrong -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoBits(TurboQuant):
    bits: int = 2


@dataclass(frozen=True)
class WideScale(TwoBits):
    """A scale 3% too large: 0.6% of the error at 2 bits, but all of the slope."""

    def _encode(self, x, statistics):
        planes = super()._encode(x, statistics)
        return {**planes, "scale": planes["scale"] * 1.03}


@dataclass(frozen=True)
class FineWideScale(WideScale):
    """The same is 10% of the error at 4 bits."""

    bits: int = 4


@dataclass(frozen=True)
class WideCells(TwoBits):
    """Cells for a deviation 10% smaller, levels and scales made for them: a codebook that is not Lloyd-Max."""

    def _encode(self, x, statistics):
        y = rotate(x.astype(mx.float32), self.seed, self.rotation)
        codes = nearest_codes(y * (1.1 * x.shape[-1] ** 0.5 / mx.linalg.norm(y, axis=-1, keepdims=True)), 2)
        levels = unpacked_levels(codes, 2)
        scale = mx.sum(y * levels, axis=-1, keepdims=True) / mx.sum(levels * levels, axis=-1, keepdims=True)
        return {"codes": pack(codes, 2), "scale": scale.astype(mx.bfloat16)}


@dataclass(frozen=True)
class Uncounted(TurboQuant):
    """Stores 4 bits and states 1."""

    bits: int = 4

    def planes(self, dim, dtype):
        return tuple(replace(plane, width=plane.width // 4 or 1) for plane in super().planes(dim, dtype))

    def expected_mse(self, dim):
        return None

    def published(self, dim):
        return None


@dataclass(frozen=True)
class OtherProducts(TwoBits):
    """Scores that are 20% above those of the decoded keys."""

    shrinkage: ClassVar[float | None] = None

    def scores(self, queries, planes, statistics=None):
        return super().scores(queries, planes) * 1.2


@dataclass(frozen=True)
class Boastful(TwoBits):
    """Right, with a paper that proves too much."""

    def published(self, dim):
        said = super().published(dim)
        assert said is not None
        return replace(said, mse_bound=0.11)


@dataclass(frozen=True)
class BoastfulProducts(TurboQuantProd):
    bits: int = 2

    def published(self, dim):
        said = super().published(dim)
        assert said is not None
        return replace(said, product_bound=0.15)


@dataclass(frozen=True)
class LeaningSigns(QJL):
    """A sign estimator whose constant is 2% off."""

    def _factor(self, dim):
        return super()._factor(dim) * 1.02


@dataclass(frozen=True)
class TiltedProducts(QJL):
    """An estimator with a constant added to every product."""

    def scores(self, queries, planes, statistics=None):
        return super().scores(queries, planes) + 0.01


@dataclass(frozen=True)
class NearProd(TurboQuantProd):
    """The residual's norm 4% short."""

    def _encode(self, x, statistics):
        planes = super()._encode(x, statistics)
        return {**planes, "norm": planes["norm"] * 0.96}


@dataclass(frozen=True)
class ShortRadius(Polar):
    """Radii 1% short."""

    def _encode(self, x, statistics):
        planes = super()._encode(x, statistics)
        return {**planes, "radii": planes["radii"] * 0.99}


@dataclass(frozen=True)
class WideSteps(KIVI):
    """Steps 2% too wide."""

    bits: int = 4

    def _encode(self, x, statistics):
        planes = super()._encode(x, statistics)
        return {**planes, "step": planes["step"] * 1.02}


SAID = {
    "band": "within its band",
    "slope": "its scale is another",
    "shannon": "not all of its bytes are counted",
    "stored": "bits per element that it states",
    "product": "not those of decoded vectors",
    "bound": "of at most",
    "additive": "an additive bias",
    "multiplicative": "a multiplicative bias",
}


@pytest.mark.parametrize(
    ("kind", "kinds_of_failure"),
    [
        (TwoBits, []),
        (WideScale, ["slope"]),
        (FineWideScale, ["band", "slope"]),
        (WideCells, ["band"]),
        (Uncounted, ["stored", "shannon"]),
        (OtherProducts, ["product"]),
        (Boastful, ["bound"]),
        (BoastfulProducts, ["bound"]),
        (LeaningSigns, ["band", "multiplicative"]),
        (TiltedProducts, ["additive"]),
        (NearProd, ["band", "multiplicative"]),
        (ShortRadius, ["slope"]),
        (WideSteps, ["band"]),
    ],
)
def test_wrong_codecs_are_told_in_what_they_are_wrong(measure, kind, kinds_of_failure) -> None:
    m = measure(kind)
    found = [next(name for name, text in SAID.items() if text in failure) for failure in m.failures]
    assert found == kinds_of_failure
    for failure in m.failures:
        assert failure.startswith(f"{m.codec} at D = 64 must ") and "got " in failure and "\n" not in failure


def test_a_bias_of_one_draw_is_looked_at_again_on_more_pairs() -> None:
    """One draw in some hundred shows a bias that is none."""
    seed = 26_000
    once = theory._measure(get_codec, ["qjl1"], 16, 4096, seed)["qjl1"]
    assert once.slope > 3.5 * once.slope_se
    (m,) = validate_codecs(["qjl1"], 16, 4096, seed)
    assert isinstance(m, Measurement)
    assert (m.pairs, m.failures) == (4 * 4096, ())
    assert validate_codecs(["qjl1"], 16, 4096, seed + 1000)[0].pairs == 4096


# ---- what cannot be measured -----------------------------------------------------------------------------------------


def test_codecs_that_cannot_do_a_head_size_say_so_in_their_place() -> None:
    found = validate_codecs(["tq2", "tq2.5", "polar4", "tq2"], 24, 4096)
    assert [type(m).__name__ for m in found] == ["Measurement", "Skipped", "Skipped", "Measurement"]
    assert found[0] == found[3]
    split = found[1]
    assert isinstance(split, Skipped)
    assert (split.codec, split.dim) == ("tq2.5", 24) and "outlier channels can be 8, 16" in split.reason
    assert all(isinstance(m, Skipped) for m in validate_codecs(["tq2", "qjl1"], 72, 4096))


def test_groups_of_tokens_that_do_not_fill_a_head_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KIVI, "group", 48)
    (found,) = validate_codecs(["kivi2"], 64, 4096)
    assert isinstance(found, Skipped) and found.reason == "its groups of 48 tokens do not fill 128"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("identity", "must be lossy and one, got identity, exact; leave it out"),
        ("tq2+tq3", "must be lossy and one, got tq2\\+tq3, a codec for each KV head; leave it out"),
        ("tq9", "codec tq9 does not exist"),
        ("what", "a codec name must start with one of"),
    ],
)
def test_names_of_no_single_lossy_codec_are_refused(name: str, said: str) -> None:
    with pytest.raises(CodecError, match=said):
        validate_codecs(["tq2", name], 64, 4096)
