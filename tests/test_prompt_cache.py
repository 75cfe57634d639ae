"""Prompt-cache files: atomic, checked, self-describing; every bad file has its own sentence and changes nothing."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.models import cache as mlx_cache

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import errors

PROMPT = 90


@pytest.fixture
def model() -> Any:
    return tiny_models.llama()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """A good file made with rvq1 by a tiny model."""
    file = tmp_path / "good.safetensors"
    with kvq.compress(model, "rvq1"):
        caches = filled(model)
        kvq.save_prompt_cache(file, caches, model=model, token_ids=range(PROMPT), metadata={"note": "hello"})
    return file


def filled(model: Any, tokens: int = PROMPT) -> list[Any]:
    caches = kvq.make_prompt_cache(model)
    mx.eval(model(mx.arange(tokens)[None] % 64, cache=caches), [cache.state for cache in caches])
    return caches


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a safetensors file with its JSON header changed."""
    data = source.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text and "must" in text and "got" in text and len(text) < 400, text


def test_header_says_what_the_file_holds(model, saved):
    info = kvq.verify_prompt_cache(saved, model)
    assert (info.format, info.scheme, info.adapter, info.layers) == (1, "rvq1", "llama", len(model.layers))
    assert info.tokens == PROMPT and info.token_ids == tuple(range(PROMPT)) and info.metadata == {"note": "hello"}
    caches, again = kvq.load_prompt_cache(saved, model)
    assert again == info and sum(cache.nbytes for cache in caches) == info.nbytes
    assert info.fp16_nbytes == kvq.cache_report(caches).fp16_nbytes


def test_loading_needs_no_compressed_model_and_ends_with_its_caches(model, saved):
    from mlx_lm.models import llama

    original = llama.scaled_dot_product_attention
    with kvq.compress(model, "rvq1"):
        caches = filled(model)
        expected = model(mx.array([[7]]), cache=caches)
    loaded, _ = kvq.load_prompt_cache(saved, model)
    assert mx.array_equal(model(mx.array([[7]]), cache=loaded), expected)
    del loaded, caches
    assert llama.scaled_dot_product_attention is original


def test_layers_left_to_mlx_lm_and_their_reasons_survive(model, tmp_path):
    with kvq.compress(model, "tq4,edges=1"):
        caches = filled(model)
        kvq.save_prompt_cache(tmp_path / "edges.safetensors", caches, model=model)
        loaded, _ = kvq.load_prompt_cache(tmp_path / "edges.safetensors", model)
        assert [type(cache) for cache in loaded] == [type(cache) for cache in caches]
        assert [row.note for row in kvq.cache_report(loaded).layers] == [
            row.note for row in kvq.cache_report(caches).layers
        ]
        token = mx.array([[3]])
        assert mx.array_equal(model(token, cache=loaded), model(token, cache=caches))


def test_mlx_lm_writes_and_reads_our_caches_by_itself(model, tmp_path):
    file = str(tmp_path / "theirs.safetensors")
    with kvq.compress(model, "k=tq4,v=affine3"):
        caches = filled(model)
        mlx_cache.save_prompt_cache(file, caches, {"by": "mlx-lm"})
        loaded, metadata = mlx_cache.load_prompt_cache(file, return_metadata=True)
        assert metadata == {"by": "mlx-lm"}
        token = mx.array([[3]])
        assert mx.array_equal(model(token, cache=loaded), model(token, cache=caches))
        with pytest.raises(errors.PromptCacheFormatError, match=r"kvq\.save_prompt_cache") as caught:
            kvq.load_prompt_cache(file, model)
    assert_one_sentence(caught.value)


def test_missing_file(model, tmp_path):
    with pytest.raises(errors.PromptCacheFormatError, match="must exist") as caught:
        kvq.load_prompt_cache(tmp_path / "none.safetensors", model)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 40, 0.3, 0.999])
def test_truncated_file(keep, model, saved, tmp_path):
    data = saved.read_bytes()
    bad = tmp_path / "short.safetensors"
    bad.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(errors.PromptCacheFormatError, match="complete safetensors file") as caught:
        kvq.load_prompt_cache(bad, model)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("place", [0.4, 0.7, 0.999])
def test_one_flipped_bit_in_the_arrays(place, model, saved, tmp_path):
    data = bytearray(saved.read_bytes())
    data[int(place * len(data))] ^= 1
    bad = tmp_path / "flipped.safetensors"
    bad.write_bytes(data)
    with pytest.raises(errors.PromptCacheCorruptError, match="digest") as caught:
        kvq.load_prompt_cache(bad, model)
    assert_one_sentence(caught.value)


def test_changed_header(model, saved, tmp_path):
    def change(header):
        info = json.loads(header["__metadata__"]["0.kvq"])
        header["__metadata__"]["0.kvq"] = json.dumps({**info, "scheme": "tq4"})

    with pytest.raises(errors.PromptCacheCorruptError, match="digest") as caught:
        kvq.verify_prompt_cache(rewritten(saved, tmp_path / "changed.safetensors", change))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("text", ["not json", "{}", '{"format": 1}'])
def test_unreadable_header(text, model, saved, tmp_path):
    def change(header):
        header["__metadata__"]["0.kvq"] = text

    with pytest.raises(errors.PromptCacheCorruptError, match="header") as caught:
        kvq.verify_prompt_cache(rewritten(saved, tmp_path / "changed.safetensors", change))
    assert_one_sentence(caught.value)


def test_newer_format(model, saved, tmp_path):
    def change(header):
        info = json.loads(header["__metadata__"]["0.kvq"])
        header["__metadata__"]["0.kvq"] = json.dumps({**info, "format": 99, "unknown": True})

    with pytest.raises(errors.PromptCacheVersionError, match="99") as caught:
        kvq.load_prompt_cache(rewritten(saved, tmp_path / "newer.safetensors", change), model)
    assert_one_sentence(caught.value)


def test_another_model_or_another_dtype(model, saved):
    other = tiny_models.llama()
    other.model.norm.weight = other.model.norm.weight * 1.01
    with pytest.raises(errors.PromptCacheModelError, match="this very model") as caught:
        kvq.load_prompt_cache(saved, other)
    assert_one_sentence(caught.value)
    model.set_dtype(mx.float16)
    with pytest.raises(errors.PromptCacheModelError):
        kvq.load_prompt_cache(saved, model)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(model, saved, monkeypatch):
    before, names = saved.read_bytes(), sorted(os.listdir(saved.parent))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with kvq.compress(model, "tq4"), pytest.raises(OSError, match="disk full"):
        kvq.save_prompt_cache(saved, filled(model), model=model)
    assert saved.read_bytes() == before and sorted(os.listdir(saved.parent)) == names


@pytest.mark.parametrize(
    ("name", "tokens", "metadata"),
    [("cache.bin", PROMPT, {}), ("a.safetensors", 0, {}), ("a.safetensors", PROMPT, {"a.b": "x"})],
    ids=["suffix", "empty", "metadata"],
)
def test_what_cannot_be_saved_is_refused(name, tokens, metadata, model, tmp_path):
    with kvq.compress(model, "tq4"):
        caches = filled(model, tokens) if tokens else kvq.make_prompt_cache(model)
        with pytest.raises(errors.PromptCacheFormatError) as caught:
            kvq.save_prompt_cache(tmp_path / name, caches, model=model, metadata=metadata)
    assert_one_sentence(caught.value)
    assert os.listdir(tmp_path) == []


def test_state_of_a_newer_version_and_of_other_codec_bytes_is_refused(model):
    with kvq.compress(model, "tq4"):
        state = filled(model)[0].state
    meta = json.loads(state["meta"])
    with pytest.raises(errors.CacheStateError, match="newer"):
        kvq.KVQCache.from_state({**state, "meta": json.dumps({**meta, "version": 99})})
    codec = json.dumps({**json.loads(meta["codecs"][0]), "version": 99})
    with pytest.raises(errors.CodecError, match="version 99"):
        kvq.KVQCache.from_state({**state, "meta": json.dumps({**meta, "codecs": [codec, codec]})})
