"""The contract of model adapters as a pytest class, and a tiny model for codecs."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models import llama

from ..adapters import FULL, SLIDING, LayerGeometry, load_adapter, model_type_of
from ..checking import FAIL, REFUSED, CheckReport, check_model
from ..routing import attention_globals


def tiny_llama(head_dim: int = 64, layers: int = 2) -> Any:
    """A random llama of mlx-lm: 4 query and 2 KV heads, 128 tokens of vocabulary."""
    mx.random.seed(7)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=layers,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            rms_norm_eps=1e-6,
            vocab_size=128,
        )
    )
    mx.eval(model.parameters())
    return model


def check_geometry(model: Any, entries: list[LayerGeometry]) -> None:
    """What an adapter says of a model, against the model itself: its cache list, modules, head counts, windows."""
    make = getattr(model, "make_cache", None)
    stock = [mlx_cache.KVCache() for _ in model.layers] if make is None else make()
    assert len(entries) == len(stock), "one entry for each of the model's own caches"
    served = [geometry for geometry in entries if geometry.kind in (FULL, SLIDING)]
    assert served, "a layer must have keys and values"
    modules = [module for _, module in model.named_modules()]
    for geometry, own in zip(entries, stock, strict=True):
        if geometry.kind not in (FULL, SLIDING):
            assert geometry.note, f"a layer of kind {geometry.kind!r} must say why it stays as it is"
            continue
        assert any(geometry.attention is module for module in modules), "the attention must be a module of the model"
        assert geometry.kv_heads > 0 and geometry.heads % geometry.kv_heads == 0, "heads share KV heads evenly"
        assert geometry.key_dim > 0 and geometry.value_dim > 0
        assert (geometry.kind == SLIDING) == (geometry.window is not None), (
            "sliding layers, and only they, have a window"
        )
        own = own if geometry.member is None else own.caches[geometry.member]
        if geometry.window is not None and isinstance(own, mlx_cache.RotatingKVCache):
            assert geometry.window == own.max_size, "the window is that of mlx-lm's cache"
        if geometry.rope is not None:
            keys = mx.random.normal((1, geometry.kv_heads, 3, geometry.key_dim))
            assert geometry.rope(keys, offset=5).shape == keys.shape, "rope turns keys (B, Hkv, L, Dk)"


_models: dict[type[AdapterSuite], Any] = {}
_reports: dict[type[AdapterSuite], CheckReport] = {}


def _model_of(suite: type[AdapterSuite]) -> Any:
    if suite not in _models:
        _models[suite] = suite().model()
        mx.eval(_models[suite].parameters())
    return _models[suite]


def _report_of(suite: type[AdapterSuite]) -> CheckReport:
    if suite not in _reports:
        schemes = [suite.scheme]
        _reports[suite] = check_model(_model_of(suite), schemes=schemes, tokens=suite.tokens, max_kl=suite.max_kl)
    return _reports[suite]


class AdapterSuite:
    """The contract of one adapter; subclass it as `Test...` with a `model`.

    Attributes:
        scheme: a lossy scheme to compress the model with.
        tokens: fed to the model, at least 128; more than its window to go past it.
        max_kl: nats a token, the mean divergence from mlx-lm's caches that the scheme may cost.
        refused: names of checks that this architecture cannot do (recurrent states cannot be trimmed, ...).
    """

    scheme: ClassVar[str] = "tq4"
    tokens: ClassVar[int] = 160
    max_kl: ClassVar[float] = 0.5
    refused: ClassVar[tuple[str, ...]] = ()

    def model(self) -> Any:
        """A small model of the architecture, made by mlx-lm's class; random float32 weights, the same at every call."""
        raise NotImplementedError

    @pytest.fixture
    def subject(self) -> Any:
        """The model, evaluated; one for all tests of the class."""
        return _model_of(type(self))

    @pytest.fixture
    def report(self) -> CheckReport:
        """All checks of `kvq check`: the identity codec against mlx-lm's caches bit for bit, then the scheme."""
        return _report_of(type(self))

    def test_geometry(self, subject: Any) -> None:
        """The adapter is found, and what it says is true."""
        adapter = load_adapter(model_type_of(subject))
        check_geometry(subject, adapter.geometry(subject))
        assert adapter.name

    def test_attention_is_routed(self, subject: Any) -> None:
        """Every served attention calls mlx-lm's function by its name, or the adapter has a class in its place."""
        adapter = load_adapter(model_type_of(subject))
        for geometry in adapter.geometry(subject):
            if geometry.kind in (FULL, SLIDING) and adapter.attention is None:
                attention_globals(geometry.attention)

    def test_identity_equals_mlx_lm(self, report: CheckReport) -> None:
        """Caches without loss give mlx-lm's logits bit for bit, in every way that mlx-lm runs a model."""
        self._passed(report, "identity")

    def test_lossy_scheme(self, report: CheckReport) -> None:
        """A lossy scheme packs, is saved, copied, trimmed and batched, and costs little."""
        self._passed(report, next(check.scheme for check in reversed(report.checks)))

    def test_parameters_stay(self, subject: Any, report: CheckReport) -> None:
        """The weights are those of before, however often the model was compressed."""
        found: Any = tree_flatten(subject.parameters())
        fresh: Any = tree_flatten(self.model().parameters())
        assert [name for name, _ in found] == [name for name, _ in fresh]
        assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(found, fresh, strict=True))

    def _passed(self, report: CheckReport, scheme: str) -> None:
        own = [check for check in report.checks if check.scheme == scheme]
        assert own and not any(check.status == FAIL for check in own), str(report)
        refused = {check.name for check in own if check.status == REFUSED}
        assert refused <= set(self.refused), str(report)
