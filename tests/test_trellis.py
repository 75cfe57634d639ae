"""Trellis codes: windows, the encoder against exhaustive search, its compiled twin, and the error they must reach."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq_plugin import native
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.codecs.trellis import TrellisCoded
from mlx_kvq_plugin.trellis import (
    MEMORY,
    Trellis,
    _path,
    _subset_table,
    encode,
    encode_plain,
    from_time,
    in_time,
    trellis,
)

every_rate = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def coded_bits(bits: np.ndarray, code: Trellis) -> np.ndarray:
    """Of trellis bits `(..., D)` in time, channel by channel from the nine bits of its window."""
    dim, coded = bits.shape[-1], np.zeros(bits.shape, int)
    for t in range(dim):
        window = [bits[..., (t - j) % dim].astype(int) for j in range(MEMORY + 1)]
        for i, generator in enumerate(code.generators):
            parity = sum(window[j] for j in range(MEMORY + 1) if generator >> j & 1) % 2
            coded[..., t] |= parity << i
    return coded


def cost_of(bits: np.ndarray, z: np.ndarray, code: Trellis) -> np.ndarray:
    """Least squared error of `z` `(D,)` with trellis bits `(..., D)`."""
    levels = np.array(code.book.levels).reshape(-1, 2**code.coded)
    return (np.abs(z[:, None] - levels.T[coded_bits(bits, code)]).min(axis=-1) ** 2).sum(axis=-1)


@every_rate
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_indices_are_those_of_windows_and_the_nearest_level_of_each(bits: int, dim: int) -> None:
    code, z = trellis(bits), normal(5, dim)
    found, index = (np.array(in_time(x)) for x in encode(mx.array(z), code))
    np.testing.assert_array_equal(index & (2**code.coded - 1), coded_bits(found, code))
    levels = np.array(code.book.levels)
    errors = (np.array(in_time(mx.array(z))) - levels[index]) ** 2
    np.testing.assert_allclose(
        errors.sum(axis=-1), [cost_of(b, x, code) for b, x in zip(found, np.array(in_time(mx.array(z))), strict=True)]
    )


@every_rate
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_packed_rows_give_the_indices_back(bits: int, dim: int) -> None:
    codec, z = get_codec(f"tcq{bits}"), mx.array(normal(1, 2, 5, dim))
    assert isinstance(codec, TrellisCoded)
    planes = codec.encode(z)
    decoded = codec.codes(planes, dim)
    trellis_bits = np.unpackbits(np.array(planes["codes"])[..., : dim // 8], axis=-1, bitorder="little")
    coded = np.array(from_time(mx.array(coded_bits(trellis_bits, codec.code))))
    np.testing.assert_array_equal(np.array(decoded) & (2**codec.code.coded - 1), coded)
    assert decoded.max().item() < len(codec.book.levels)


@every_rate
def test_no_other_path_from_and_to_the_same_state_is_better(bits: int) -> None:
    code, dim = trellis(bits), 16
    z = normal(6, dim, seed=bits)
    found = np.array(encode_plain(mx.array(z), code)[0])
    every = (np.arange(256)[:, None] >> np.arange(8)) & 1
    for x, own in zip(z, found, strict=True):
        others = np.concatenate([every, np.tile(own[8:], (256, 1))], axis=-1)  # the last eight bits are the state
        assert cost_of(own, x, code) == pytest.approx(cost_of(others, x, code).min(), rel=1e-5)


@every_rate
@pytest.mark.parametrize("dim", [64, 128])
def test_the_state_at_the_ends_costs_little(bits: int, dim: int) -> None:
    code, z = trellis(bits), normal(24, dim, seed=bits)
    found = np.array(encode_plain(mx.array(z), code)[0])
    levels = mx.array(np.array(code.book.levels, np.float32).reshape(-1, 2**code.coded))
    subsets = mx.array(_subset_table(code.generators).astype(np.int32))
    own, best = 0.0, 0.0
    for x, bits_found in zip(z, found, strict=True):
        distance = mx.square(mx.array(x)[:, None, None] - levels[None]).min(axis=1)[..., None]
        starts = mx.arange(256)  # the best path from and to each state
        states = _path(mx.broadcast_to(distance, (*distance.shape[:2], 256)), subsets, starts, starts)
        others = np.stack([np.array(state) & 1 for state in states[1:]], axis=-1)
        costs = cost_of(others, x, code)
        own, best = own + cost_of(bits_found, x, code), best + costs.min()
    assert best * (1 - 1e-6) <= own < {64: 1.06, 128: 1.03}[dim] * best


@every_rate
@pytest.mark.parametrize(("count", "dim"), [(1, 64), (8, 16), (21, 80), (3, 128)])
def test_compiled_encoder_gives_the_same_bits(bits: int, count: int, dim: int) -> None:
    assert native.library("trellis") is not None
    z = mx.array(normal(count, dim, seed=count))
    compiled, plain = encode(from_time(z), trellis(bits)), encode_plain(z, trellis(bits))
    for a, b in zip(compiled, plain, strict=True):
        np.testing.assert_array_equal(np.array(in_time(a)), np.array(b))


@pytest.mark.parametrize(("bits", "most"), [(1, 0.29), (2, 0.078), (3, 0.0215), (4, 0.0063)])
def test_error_of_normal_numbers(bits: int, most: float) -> None:
    x = normal(1, 1, 400, 128)
    codec = get_codec(f"tcq{bits}")
    decoded = np.array(codec.decode(codec.encode(mx.array(x)), 128))
    error = np.sum((x - decoded) ** 2) / np.sum(x**2)
    assert 4.0**-bits < error < most


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing compiled yet."""
    native.library.cache_clear()
    monkeypatch.setenv("KVQ_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    native.library.cache_clear()


def test_without_a_compiler_one_warning_says_so(fresh: Path, monkeypatch, caplog) -> None:
    expected = get_codec("tcq2").encode(mx.array(normal(1, 1, 3, 64)))
    native.library.cache_clear()
    monkeypatch.setattr(native, "compiler", lambda: None)
    with caplog.at_level(logging.WARNING, "mlx_kvq_plugin"):
        for _ in range(2):
            planes = get_codec("tcq2").encode(mx.array(normal(1, 1, 3, 64)))
    assert len(caplog.records) == 1 and "install g++" in caplog.text
    for name, plane in expected.items():
        np.testing.assert_array_equal(np.array(plane.view(mx.uint8)), np.array(planes[name].view(mx.uint8)))


def test_plain_operations_on_a_gpu_are_said_once(monkeypatch, caplog) -> None:
    x = mx.array(normal(1, 1, 3, 64))
    expected = get_codec("tcq2").encode(x)
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    with caplog.at_level(logging.WARNING, "mlx_kvq_plugin"):
        planes = [get_codec("tcq2").encode(x) for _ in range(2)]
    assert len(caplog.records) == 1 and "plain MLX operations on the GPU" in caplog.text
    for name, plane in expected.items():
        np.testing.assert_array_equal(np.array(plane.view(mx.uint8)), np.array(planes[0][name].view(mx.uint8)))


def test_what_a_compiler_refuses_is_said(fresh: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(native, "FLAGS", ("-no-such-flag",))
    with caplog.at_level(logging.WARNING, "mlx_kvq_plugin"):
        assert native.library("trellis") is None
    assert "no-such-flag" in caplog.text


def test_the_library_is_compiled_once_and_kept(fresh: Path, monkeypatch) -> None:
    assert native.library("trellis") is not None
    (kept,) = (fresh / "native").iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *given: pytest.fail("compiled again"))
    assert native.library("trellis") is not None and kept.suffix == ".so"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("")
    native.library.cache_clear()
    monkeypatch.setenv("KVQ_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "mlx_kvq_plugin"):
        assert native.library("trellis") is None
    native.library.cache_clear()
    assert "KVQ_CACHE_DIR" in caplog.text


def test_rates_that_do_not_exist_are_refused() -> None:
    from mlx_kvq_plugin.errors import CodecError

    with pytest.raises(CodecError, match="choose one of tcq1, tcq2, tcq3, tcq4"):
        get_codec("tcq5")
