"""Every architecture on every way mlx-lm runs a model: equal with lossless codes, or refused by name.

Caches with the codec `identity` must give bit for bit the logits of mlx-lm's own caches, and the same tokens where
mlx-lm chooses them. What mlx-lm itself cannot do is listed in `EXCEPTIONS`. The table of all cells is printed at the
end of the run (conftest.py).
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    make_prompt_cache,
    trim_prompt_cache,
)
from tiny_models import ARCHITECTURES, VOCAB

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.adapters import REFUSED as REFUSED_TYPES
from mlx_kvq_plugin.adapters import list_adapters
from mlx_kvq_plugin.batch import BatchKVQCache
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.cli.models import LoadedModel
from mlx_kvq_plugin.errors import CacheStateError, UnsupportedModelError
from mlx_kvq_plugin.loading import CacheMaker, LayerPlan
from mlx_kvq_plugin.report import cache_report
from mlx_kvq_plugin.rotary import turn
from mlx_kvq_plugin.sliding import SlidingKVQCache

# Cache entries in order: F full and S sliding compressed ones; R recurrent, C chunked ones of mlx-lm;
# B both a recurrent state and a compressed cache.
ENTRIES = {
    "llama": "FFF",
    "llama sliding": "SFSS",
    "mistral": "FFF",
    "mistral3": "FFF",
    "mistral3 of ministral3": "FF",
    "ministral3": "FSF",
    "mixtral": "FF",
    "qwen2": "FFF",
    "qwen2_moe": "FF",
    "qwen3": "FFF",
    "qwen3_moe": "FF",
    "qwen3_next": "RFRF",
    "qwen3_5": "RFRF",
    "qwen3_5_moe": "RFRF",
    "gemma": "FF",
    "gemma2": "FF",
    "gemma3_text": "SSFS",
    "gemma3": "SSFS",
    "gemma3n": "FSSF",
    "gemma4_text": "SSF",
    "gemma4": "SSF",
    "phi": "FF",
    "phi3": "FFF",
    "phimoe": "FF",
    "falcon_h1": "BB",
    "gpt_oss": "SFSF",
    "smollm3": "FFF",
    "olmo2": "FF",
    "granite": "FF",
    "cohere2": "SFSF",
    "exaone4": "SSF",
    "exaone4 full": "FF",
    "starcoder2": "FF",
    "glm4": "FF",
    "llama4": "CCCF",
    "nemotron_h": "RFRF",
}
SINGLE = {"F": [KVQCache], "S": [SlidingKVQCache], "R": [ArraysCache], "C": [ChunkedKVCache]}
SINGLE["B"] = SINGLE["R"] + SINGLE["F"]

TOKENS = np.random.default_rng(0).integers(0, VOCAB, 400).tolist()
PROMPT = 168  # longer than the windows
STEPS = 8
GREEDY = 6  # tokens generated, where tokens are compared
LENGTHS = [30, 171, 100]  # of the prompts of a batch

RECURRENT = "refused: recurrent states cannot be trimmed (mlx-lm's ArraysCache)"
CHUNKED = "refused: mlx-lm has no batches of its ChunkedKVCache"
LOST_STATE = "refused: mlx-lm's nemotron_h.py loses the recurrent state of padded rows; its own caches give wrong text"
CELL = "conformance"  # the property of a test's report that conftest.py reads
EXCEPTIONS = {
    (name, path): reason
    for names, paths, reason in [
        (("qwen3_next", "qwen3_5", "qwen3_5_moe", "nemotron_h", "falcon_h1"), ("trim", "speculative"), RECURRENT),
        (("llama4",), ("uneven batch", "late joiner"), CHUNKED),
        (("nemotron_h",), ("uneven batch",), LOST_STATE),
    ]
    for name in names
    for path in paths
}


class Otherwise(Exception):
    """Not equal to a single run of mlx-lm: mlx-lm said that it cannot do this, or does the same without compression."""


@cache
def model_of(name: str) -> Any:
    return ARCHITECTURES[name]()


@cache
def stock_model(name: str) -> Any:
    """The same model, never compressed."""
    return ARCHITECTURES[name]()


@contextmanager
def made_caches() -> Iterator[list[list[Any]]]:
    """Every cache list that compressed models make meanwhile."""
    made: list[list[Any]] = []
    original = CacheMaker.__call__

    def call(maker: CacheMaker) -> list[Any]:
        made.append(original(maker))
        return list(made[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheMaker, "__call__", call)
        yield made


def members(caches: list[Any]) -> list[Any]:
    """The caches with `CacheList` taken apart."""
    return [part for entry in caches for part in (entry.caches if type(entry) is CacheList else [entry])]


def check_live(name: str, caches: list[Any], packs: bool = True) -> None:
    """The caches are of the classes that `ENTRIES` says, and the compressed ones do hold codes."""
    assert [type(c) for c in members(caches)] == [kind for entry in ENTRIES[name] for kind in SINGLE[entry]]
    ours = [c for c in members(caches) if isinstance(c, KVQCache)]
    assert ours and (not packs or all(c.packed_tokens > 0 for c in ours))


def run(model: Any, sizes: list[int], caches: list[Any], start: int = 0) -> mx.array:
    """Logits `(1, sum(sizes), V)` of tokens fed in calls of `sizes` tokens."""
    outputs = []
    for size in sizes:
        outputs.append(model(mx.array([TOKENS[start : start + size]]), cache=caches))
        mx.eval(outputs[-1])
        start += size
    return mx.concatenate(outputs, axis=1)


@cache
def stock_run(name: str, *sizes: int) -> mx.array:
    """What mlx-lm computes with its own caches."""
    return run(stock_model(name), list(sizes), make_prompt_cache(stock_model(name)))


def greedy(model: Any, length: int, count: int) -> list[int]:
    """Greedy tokens after the first `length` ones of `TOKENS`, one sequence alone."""
    return [int(token) for token, _ in generate_step(mx.array(TOKENS[:length]), model, max_tokens=count)]


@cache
def stock_greedy(name: str, length: int, count: int) -> list[int]:
    return greedy(stock_model(name), length, count)


# ---- the paths ---------------------------------------------------------------------------------------------------
# Each runs inside `kvq.compress(model, "identity")` and asserts equality with mlx-lm, or raises Otherwise.


def single(name: str, model: Any, tmp_path: Path) -> None:
    sizes = [PROMPT] + [1] * STEPS
    caches = make_prompt_cache(model)
    assert mx.array_equal(run(model, sizes, caches), stock_run(name, *sizes))
    check_live(name, caches)


def chunked_prefill(name: str, model: Any, tmp_path: Path) -> None:
    sizes = [64, 3, 80, 30, 1, 17] + [1] * 4
    caches = make_prompt_cache(model)
    assert mx.array_equal(run(model, sizes, caches), stock_run(name, *sizes))
    check_live(name, caches)


def trim(name: str, model: Any, tmp_path: Path) -> None:
    """Within the windows, as mlx-lm allows: into what is packed, then other tokens."""
    caches = make_prompt_cache(model)
    run(model, [140, 1, 1], caches)
    check_live(name, caches)
    if trim_prompt_cache(caches, 42) == 0:
        kinds = {type(c) for c in members(caches) if not c.is_trimmable()}
        assert kinds == {ArraysCache}
        raise Otherwise(RECURRENT)
    found = run(model, [20] + [1] * STEPS, caches, start=90)
    check_live(name, caches)
    stock = make_prompt_cache(stock_model(name))
    run(stock_model(name), [140, 1, 1], stock)
    assert trim_prompt_cache(stock, 42) == 42
    assert mx.array_equal(found, run(stock_model(name), [20] + [1] * STEPS, stock, start=90))


def save_load(name: str, model: Any, tmp_path: Path) -> None:
    sizes = [PROMPT] + [1] * STEPS
    caches = make_prompt_cache(model)
    run(model, sizes[:4], caches)
    kvq.save_prompt_cache(tmp_path / "prompt.safetensors", caches, model=model)
    loaded, _ = kvq.load_prompt_cache(tmp_path / "prompt.safetensors", model)
    check_live(name, loaded)
    found = run(model, sizes[4:], loaded, start=PROMPT + 3)
    assert mx.array_equal(found, stock_run(name, *sizes)[:, PROMPT + 3 :])


def deep_copy(name: str, model: Any, tmp_path: Path) -> None:
    sizes = [PROMPT] + [1] * STEPS
    expected = stock_run(name, *sizes)[:, PROMPT + 3 :]
    caches = make_prompt_cache(model)
    run(model, sizes[:4], caches)
    copied, other = copy.deepcopy(caches), copy.deepcopy(caches)
    run(model, [20, 1, 1], other, start=5)
    assert mx.array_equal(run(model, sizes[4:], copied, start=PROMPT + 3), expected)
    assert mx.array_equal(run(model, sizes[4:], caches, start=PROMPT + 3), expected)
    check_live(name, copied)


class NoText:
    """What `batch_generate` wants of a tokenizer."""

    eos_token_ids: tuple[int, ...] = ()

    def decode(self, ids: list[int]) -> str:
        return ""


def batch_tokens(model: Any, count: int) -> tuple[list[list[int]], list[list[Any]]]:
    prompts = [TOKENS[:length] for length in LENGTHS]
    found = mlx_lm.batch_generate(
        model, NoText(), prompts, max_tokens=count, return_prompt_caches=True, return_token_ids=True
    )
    return found.token_ids, found.caches


def unbatchable(error: ValueError) -> Otherwise:
    assert "ChunkedKVCache'> does not yet support batching" in str(error)
    return Otherwise(CHUNKED)


def uneven_batch(name: str, model: Any, tmp_path: Path) -> None:
    try:
        tokens, caches = batch_tokens(model, GREEDY)
    except CacheStateError as error:
        if "padding change the recurrent state" not in str(error):
            raise
        assert batch_tokens(stock_model(name), GREEDY)[0] != [stock_greedy(name, length, GREEDY) for length in LENGTHS]
        raise Otherwise(LOST_STATE) from error
    except ValueError as error:
        raise unbatchable(error) from error
    for extracted, length in zip(caches, LENGTHS, strict=True):
        check_live(name, extracted, packs=length > 80)
    expected = [stock_greedy(name, length, GREEDY) for length in LENGTHS]
    assert tokens == expected


def late_joiner(name: str, model: Any, tmp_path: Path) -> None:
    found: dict[int, list[int]] = {}
    generator = BatchGenerator(model, max_tokens=2 * GREEDY, prefill_step_size=64)
    lengths, together = {}, 0
    try:
        for length in LENGTHS:
            [uid] = generator.insert([TOKENS[:length]])
            lengths[uid] = length
            for _ in range(5):
                collect(generator, found)
                together = max(together, len(generator._generation_batch))
        assert together == len(LENGTHS)
        live = members(generator._generation_batch.prompt_cache)
        kinds = [kind for entry in ENTRIES[name] for kind in SINGLE[entry]]
        assert [type(c) for c in live] == [BatchKVQCache if issubclass(k, KVQCache) else k for k in kinds]
        while collect(generator, found):
            pass
    except ValueError as error:
        raise unbatchable(error) from error
    finally:
        generator.close()
    assert found == {uid: stock_greedy(name, length, 2 * GREEDY) for uid, length in lengths.items()}


def collect(generator: BatchGenerator, found: dict[int, list[int]]) -> bool:
    """One round of the generator; whether anything was left to do."""
    prompts, responses = generator.next()
    for response in responses:
        found.setdefault(response.uid, []).append(response.token)
    return bool(prompts or responses)


@cache
def draft() -> Any:
    return tiny_models.llama(seed=7, num_hidden_layers=1)


def speculative(name: str, model: Any, tmp_path: Path) -> None:
    """Verifies three draft tokens at a time, within the window and past it."""

    def tokens() -> list[int]:
        steps = speculative_generate_step(mx.array(TOKENS[:150]), model, draft(), num_draft_tokens=3, max_tokens=18)
        return [int(token) for token, _, _ in steps]

    if EXCEPTIONS.get((name, "speculative")) == RECURRENT:
        kind = "CacheList" if name == "falcon_h1" else "ArraysCache"
        with pytest.raises(ValueError, match=rf"requires a trimmable prompt cache \(got {{'{kind}'}}\)"):
            tokens()
        raise Otherwise(RECURRENT)
    with made_caches() as made:
        assert tokens() == stock_greedy(name, 150, 18)
    check_live(name, *made)


def server_thread(name: str, model: Any, tmp_path: Path) -> None:
    """mlx-lm's server generates in a thread of its own: nothing may be left to evaluate in this one."""
    with made_caches() as made:
        assert in_thread(lambda: greedy(model, PROMPT, GREEDY)) == stock_greedy(name, PROMPT, GREEDY)
    check_live(name, *made)


def in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


PATHS: dict[str, Callable[[str, Any, Path], None]] = {
    "single": single,
    "chunked prefill": chunked_prefill,
    "uneven batch": uneven_batch,
    "late joiner": late_joiner,
    "trim": trim,
    "save/load": save_load,
    "deepcopy": deep_copy,
    "speculative": speculative,
    "server thread": server_thread,
}


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_lossless_caches_equal_those_of_mlx_lm(name, path, tmp_path, record_property):
    """A cell of the table that conftest.py prints: `exact`, or what else is the case."""
    cell = "FAILED"
    try:
        with kvq.compress(model_of(name), "identity"):
            PATHS[path](name, model_of(name), tmp_path)
        cell = "exact"
    except Otherwise as otherwise:
        cell = str(otherwise)
    finally:
        record_property(CELL, [name, path, cell])
    assert cell == EXCEPTIONS.get((name, path), "exact")


def test_every_adapter_has_a_tiny_model():
    aliases = {"falcon3", "iquestcoder", "xverse", "gemma4_unified"}  # run by the files of others
    types = {name.split()[0] for name in ARCHITECTURES}
    assert types == set(list_adapters()) - aliases
    assert all(name.startswith(model_of(name).model_type) for name in ARCHITECTURES)
    assert set(ENTRIES) == set(ARCHITECTURES)


# ---- what the adapters say ---------------------------------------------------------------------------------------


def attention_keys(plan: LayerPlan, tokens: int) -> mx.array:
    """The keys `(1, Hkv, tokens, D)` that one layer's attention caches for equal inputs at all positions."""
    attention = plan.geometry.attention
    parameters = dict(tree_flatten(attention.parameters()))
    width = next(w for name, w in parameters.items() if name in ("k_proj.weight", "qkv_proj.weight")).shape[-1]
    x = np.random.default_rng(1).standard_normal((1, 1, width)).astype(np.float32)
    stored = KVQCache(plan.spec, plan.rotary)
    attention(mx.repeat(mx.array(x), tokens, axis=1), mask=None, cache=stored)
    keys, values = stored.decode_all()
    geometry = plan.geometry
    assert keys.shape == (1, geometry.kv_heads, tokens, geometry.key_dim)
    assert values.shape == (1, geometry.kv_heads, tokens, geometry.value_dim)
    assert attention.o_proj.weight.shape[-1] == geometry.heads * geometry.value_dim if "o_proj" in attention else True
    return keys


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_plan_describes_the_keys_that_attention_caches(name):
    """Equal inputs give keys that differ by the rotation alone: it must be the one that the plan says."""
    with kvq.compress(model_of(name), "identity") as compression:
        plans = compression.maker.plan()
        for plan in plans:
            if plan.spec is None:
                continue
            keys = attention_keys(plan, 70)
            turned = mx.arange(plan.geometry.key_dim) < 2 * plan.rotary.pairs  # the only channels with a magnitude
            expected = turn(plan.rotary, keys[..., :1, :] / mx.where(turned, plan.rotary.magnitude, 1.0), 0, 70)
            np.testing.assert_allclose(np.array(keys), np.array(expected), atol=2e-3 * float(mx.max(mx.abs(keys))))
            moved = mx.max(mx.abs(keys - keys[..., :1, :])).item()
            assert (moved > 0.01) == (plan.rotary.pairs > 0)
    assert [plan.index for plan in plans] == list(range(len(ENTRIES[name])))


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_text"])
def test_layers_that_others_read_are_shared(name):
    with kvq.compress(model_of(name), "tq4") as compression:
        shared = [cache.shared for cache in compression.maker()]
    assert shared == {"gemma3n": [False, False, True, True], "gemma4_text": [False, True, True]}[name]


# ---- lossy codes -------------------------------------------------------------------------------------------------


# RMS error of the logits over their RMS with 4-bit codes, as found. It is large where all attention heads are peaked
# and keys are biased, small where attention adds little to what the other layers compute.
TQ4_ERROR = {
    "llama": 0.177,
    "llama sliding": 0.228,
    "mistral": 0.167,
    "mistral3": 0.186,
    "mistral3 of ministral3": 0.161,
    "ministral3": 0.228,
    "mixtral": 0.134,
    "qwen2": 0.290,
    "qwen2_moe": 0.171,
    "qwen3": 0.146,
    "qwen3_moe": 0.209,
    "qwen3_next": 0.101,
    "qwen3_5": 0.124,
    "qwen3_5_moe": 0.104,
    "gemma": 0.007,
    "gemma2": 0.011,
    "gemma3_text": 0.032,
    "gemma3": 0.032,
    "gemma3n": 0.052,
    "gemma4_text": 0.055,
    "gemma4": 0.042,
    "phi": 0.077,
    "phi3": 0.163,
    "phimoe": 0.226,
    "falcon_h1": 0.081,
    "gpt_oss": 0.099,
    "smollm3": 0.150,
    "olmo2": 0.259,
    "granite": 0.045,
    "cohere2": 0.120,
    "exaone4": 0.223,
    "exaone4 full": 0.149,
    "starcoder2": 0.101,
    "glm4": 0.210,
    "llama4": 0.053,
    "nemotron_h": 0.097,
}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_lossy_caches_stay_close_and_batches_compute_what_single_runs_do(name):
    model, sizes = model_of(name), [PROMPT] + [1] * STEPS
    expected = stock_run(name, *sizes)
    with kvq.compress(model, "tq4"):
        caches = make_prompt_cache(model)
        found = run(model, sizes, caches)
        check_live(name, caches)
        alone = [greedy(model, length, GREEDY) for length in LENGTHS]
        threaded = in_thread(lambda: greedy(model, LENGTHS[1], GREEDY))
        exception = EXCEPTIONS.get((name, "uneven batch"))
        together = alone if exception else batch_tokens(model, GREEDY)[0]
    # Nothing is packed before every layer has attended to the first chunk.
    assert mx.array_equal(found[:, :PROMPT], expected[:, :PROMPT])
    a, b = (np.array(x).astype(np.float64)[:, PROMPT:] for x in (found, expected))
    error = np.sqrt(((a - b) ** 2).mean() / (b**2).mean())
    assert 0.6 * TQ4_ERROR[name] < error < 1.5 * TQ4_ERROR[name]
    assert together == alone and alone[1] == threaded


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(REFUSED_TYPES))
def test_types_that_cannot_be_served_are_refused_with_the_reason(model_type):
    model = tiny_models.llama(num_hidden_layers=1, model_type=model_type)
    for unknown_arch in ("error", "generic"):
        with pytest.raises(UnsupportedModelError) as caught:
            kvq.compress(model, "tq4", unknown_arch=unknown_arch)
        assert repr(model_type) in str(caught.value) and REFUSED_TYPES[model_type] in str(caught.value)
    assert "make_cache" not in vars(model)


def test_a_wrapper_refuses_a_text_model_with_latent_attention():
    model = tiny_models.mistral3()
    model.language_model.model_type = "mistral4"
    with pytest.raises(UnsupportedModelError, match=r"'mistral4'.*latent"):
        kvq.compress(model, "tq4")


# ---- single architectures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["one KV head", "as many as rows", "as many as heads"])
@pytest.mark.parametrize("scheme", ["identity", "identity,edges=1", "tq4"])
def test_batches_of_gemma2_compute_what_single_runs_do(kv_heads, scheme):
    """mlx-lm's own fail, or give wrong tokens when there are as many rows as KV heads: its masks lack an axis."""
    model = tiny_models.gemma2(num_key_value_heads=kv_heads)
    lengths = [100, 20]
    expected = [greedy(model, length, STEPS) for length in lengths]
    prompts = [TOKENS[:length] for length in lengths]
    with kvq.compress(model, scheme):
        if scheme == "tq4":
            expected = [greedy(model, length, STEPS) for length in lengths]
        found = mlx_lm.batch_generate(model, NoText(), prompts, max_tokens=STEPS, return_token_ids=True)
    assert found.token_ids == expected


def test_gemma2_gets_its_own_attention_back():
    model = tiny_models.gemma2()
    original = {type(layer.self_attn) for layer in model.layers}
    with kvq.compress(model, "tq4"):
        replaced = {type(layer.self_attn) for layer in model.layers}
        copied = copy.deepcopy(model)
    assert len(original) == len(replaced) == 1 and original != replaced
    assert {type(layer.self_attn) for layer in model.layers} == original
    assert {type(layer.self_attn) for layer in copied.layers} == replaced  # it stays compressed
    with kvq.compress(model, "fp16"):
        assert {type(layer.self_attn) for layer in model.layers} == original


def test_the_tiny_gemma2_has_scores_that_the_cap_bends():
    """Else the other tests would not see it missing."""
    model = tiny_models.gemma2(attn_logit_softcapping=1e4)
    uncapped = run(model, [PROMPT, 1], make_prompt_cache(model))
    assert not mx.allclose(uncapped, stock_run("gemma2", PROMPT, 1), atol=0.1)


def test_entries_with_two_members_report_both():
    model = tiny_models.falcon_h1(num_hidden_layers=3)
    with kvq.compress(model, "tq4,edges=1"):
        caches = make_prompt_cache(model)
        run(model, [PROMPT, 1], caches)
        report = cache_report(caches)
    assert [type(c.caches[1]) for c in caches] == [KVCache, KVQCache, KVCache]
    assert [layer.applied for layer in report.layers] == [None, "tq4", None]
    notes = ["edge layer (edges=1)", "the recurrent state beside it stays", "edge layer (edges=1)"]
    assert [layer.note for layer in report.layers] == notes
    assert [layer.packed > 100 for layer in report.layers] == [False, True, False]


# ---- kvq inspect -------------------------------------------------------------------------------------------------


INSPECTED = {
    "nemotron_h": [
        "4 cache entries for 5 layers",
        "recurrent  -  -  -  -; recurrent state, no keys and values",
        "none",
    ],
    "falcon_h1": ["2 cache entries", "member 1 of its entry; the recurrent state beside it stays"],
    "gemma3n": ["4 cache entries for 6 layers", "half; later layers attend to it too"],
    "llama4": [
        "chunked  4/2  64/64  64  RoPE",
        "interleaved; holds the newest chunk only",
        "full  4/2  64/64  -  none",
    ],
    "gemma4_text": ["full  2/1  512/512  -  ProportionalRoPE, 256 pairs, half; later layers attend to it too"],
}


@pytest.mark.parametrize("name", list(INSPECTED))
def test_inspect_says_what_happens_to_each_entry(name, monkeypatch, capsys):
    loaded = LoadedModel(model_of(name), None, {}, name, True)
    monkeypatch.setattr("mlx_kvq_plugin.cli.schemes.load_model", lambda *_, **__: loaded)
    assert main(["inspect", name, "--kv-scheme", "tq4"]) == 0
    out = re.sub(" {2,}", "  ", capsys.readouterr().out)
    for text in INSPECTED[name]:
        assert text in out
    assert main(["inspect", name, "--kv-scheme", "tq4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    applied = [layer["applied"] for layer in report["schemes"][1]["layers"]]
    assert applied == ["tq4" if entry in "FSB" else None for entry in ENTRIES[name]]
    assert [layer["shared"] for layer in report["layers"]] == [c.geometry.shared for c in plans_of(name)]


def plans_of(name: str) -> list[LayerPlan]:
    with kvq.compress(model_of(name), "tq4") as compression:
        return compression.maker.plan()
