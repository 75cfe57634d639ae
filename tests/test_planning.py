"""Planned bytes equal what real caches allocate; skeletons of large models have their sizes and take no memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.models import cache as mlx_cache

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.attention import AttendArgs, attend
from mlx_kvq_plugin.errors import UnsupportedModelError
from mlx_kvq_plugin.handle import KVHandle
from mlx_kvq_plugin.layouts import CHUNK
from mlx_kvq_plugin.planning import SchemePlan, adapter_of, head_bits, longest_context, plan_caches, plan_scheme
from mlx_kvq_plugin.skeleton import estimate_weights, model_dtype, model_skeleton, trained_positions

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
    "torch_dtype": "bfloat16",
}
GEMMA3_27B = {
    "model_type": "gemma3",
    "vocab_size": 262208,
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
    },
}

# ---- planned and allocated bytes -----------------------------------------------------------------------------------


def feed(layer: Any, geometry: Any, size: int, dtype: mx.Dtype = mx.float16) -> None:
    """One call of `size` random tokens, as the model makes it. Nothing is evaluated: sizes are known before."""
    cache = layer if geometry.member is None else layer.caches[geometry.member]
    if isinstance(cache, mlx_cache.ChunkedKVCache):
        cache.maybe_trim_front()
    keys, values = (
        mx.random.normal((1, geometry.kv_heads, size, dim)).astype(dtype)
        for dim in (geometry.key_dim, geometry.value_dim)
    )
    handle, _ = cache.update_and_fetch(keys, values)
    if isinstance(handle, KVHandle):
        queries = mx.random.normal((1, geometry.heads, size, geometry.key_dim)).astype(dtype)
        attend(AttendArgs(queries, cache, 0.1, "causal" if size > 1 else None, None, dtype, dtype))


def held_bytes(
    plan: SchemePlan, caches: list[Any], tokens: int, steps: int, dtype: mx.Dtype = mx.float16
) -> tuple[int, int]:
    """Bytes that real caches allocate after a prompt in chunks and `steps` single tokens, and the most on the way."""
    prompt = tokens - steps
    chunks = [min(CHUNK, prompt - first) for first in range(0, prompt, CHUNK)]
    nbytes = most = 0
    for position, size in enumerate(chunks + [1] * steps):
        nbytes = 0
        for layer, cache in zip(plan.layers, caches, strict=True):
            if layer.geometry.kv_heads:
                feed(cache, layer.geometry, size, dtype)
                part = cache if layer.geometry.member is None else cache.caches[layer.geometry.member]
                if position < len(chunks):
                    _ = part.state  # mlx-lm evaluates it after each chunk
                nbytes += part.nbytes
        most = max(most, nbytes)
    return nbytes, most


SCHEMES = (
    "fp16",
    "tq4",
    "tq3",
    "rvq1",
    "affine4",
    "identity",
    "k=tq4,v=affine2",
    "k=rvq2,v=fp16,frame=off",
    "tq4,edges=1",
    "tq4,sinks=0,recent=40,compress_after=prefill",
)
LENGTHS = ((1, 1), (60, 20), (80, 1), (150, 100), (1000, 90), (4096, 20), (9000, 9))  # tokens, steps


@pytest.mark.parametrize("scheme", SCHEMES)
def test_planned_bytes_are_what_caches_allocate(scheme: str) -> None:
    model = tiny_models.llama_sliding()
    with kvq.compress(model, scheme) as compression:
        plan = plan_caches(compression.maker)
        for tokens, steps in LENGTHS:
            found = held_bytes(plan, compression.maker(), tokens, steps)
            assert found == (plan.nbytes(tokens, steps=steps), plan.peak_nbytes(tokens, steps=steps)), tokens


@pytest.mark.parametrize(
    "scheme", ["kivi2", "tq2.5", "tq3+tq2", "k=kivi2+affine4,v=rvq1+tq5", "kivi2,compress_after=prefill"]
)
def test_groups_of_tokens_fitted_codecs_and_codecs_per_head_are_counted(scheme: str) -> None:
    with kvq.compress(tiny_models.llama_sliding(), scheme) as compression:
        plan = plan_caches(compression.maker)
        for tokens, steps in ((200, 70), (4096, 40), (4200, 93)):  # the last chunk of the third is a step of several
            found = held_bytes(plan, compression.maker(), tokens, steps)
            assert found == (plan.nbytes(tokens, steps=steps), plan.peak_nbytes(tokens, steps=steps)), tokens


def test_statistics_of_some_of_three_heads_are_counted_to_the_byte() -> None:
    model = tiny_models.llama(num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=3)
    with kvq.compress(model, "tq2.5+tq3+tq3") as compression:
        plan = plan_caches(compression.maker)
        assert held_bytes(plan, compression.maker(), 300, 9)[0] == plan.nbytes(300, steps=9)


@pytest.mark.parametrize("name", ["llama4", "falcon_h1", "gemma3n", "mistral3", "gemma4_text"])
def test_other_caches_of_mlx_lm_and_shared_layers(name: str) -> None:
    """Chunked and rotating ones, members of lists, full caches of sliding layers, layers that others read."""
    model = tiny_models.ARCHITECTURES[name]()
    for scheme in ("fp16", "tq4"):
        with kvq.compress(model, scheme) as compression:
            plan = plan_caches(compression.maker)
            for tokens, steps in ((150, 100), (4096, 20)):
                found = held_bytes(plan, compression.maker(), tokens, steps)
                assert found == (plan.nbytes(tokens, steps=steps), plan.peak_nbytes(tokens, steps=steps)), scheme
            assert plan.uncounted == (len(plan.layers) if name == "falcon_h1" else 0)


def test_growth_slack_of_long_replies_is_counted() -> None:
    with kvq.compress(tiny_models.llama(num_hidden_layers=1), "rvq1") as compression:
        plan = plan_caches(compression.maker)
        assert held_bytes(plan, compression.maker(), 6000, 600)[0] == plan.nbytes(6000, steps=600)
        assert plan.nbytes(6000, steps=600) > plan.nbytes(6000, steps=1)


def test_evaluated_caches_of_a_model_hold_the_planned_bytes_too() -> None:
    model = tiny_models.llama_sliding()
    with kvq.compress(model, "tq4") as compression:
        plan, caches = plan_caches(compression.maker, itemsize=4), kvq.make_prompt_cache(model)
        for size in (300, 1, 1):
            mx.eval(model(mx.arange(size)[None] % 97, cache=caches))
        assert sum(cache.nbytes for cache in caches) == plan.nbytes(302, steps=2)
        assert plan.nbytes(302, steps=2, batch=3) == 3 * plan.nbytes(302, steps=2)


def test_float32_models_and_batches() -> None:
    with kvq.compress(tiny_models.llama(), "k=affine4,v=affine4,frame=off") as compression:
        plan = plan_caches(compression.maker, itemsize=4)
        found = held_bytes(plan, compression.maker(), 700, 9, mx.float32)
        assert found == (plan.nbytes(700, steps=9), plan.peak_nbytes(700, steps=9))


def test_a_prompt_that_stays_dense_counts_on_the_way() -> None:
    with kvq.compress(tiny_models.llama(), "tq4,compress_after=prefill") as compression:
        plan = plan_caches(compression.maker)
    dense = 4095 * 3 * 2 * 128 * 2
    assert plan.nbytes(4096, steps=1) < dense / 3 < dense <= plan.peak_nbytes(4096, steps=1) <= 1.01 * dense


def test_schemes_that_a_head_size_forbids_have_an_error() -> None:
    model = tiny_models.llama(head_dim=36)
    plan = plan_scheme(model, kvq.parse_scheme("tq4"), adapter_of(model))
    assert plan.layers == () and "36" in plan.error


@pytest.mark.parametrize("scheme", ["tq@2.5", "k=tq@3.25,v=tq2", "k=tq@3.5,v=affine@2.5,edges=1"])
def test_average_bits_are_those_of_the_bytes(scheme: str) -> None:
    """Nothing is calibrated: bytes lie between those of the whole bits around, where the average is."""
    model = tiny_models.llama(num_hidden_layers=4)
    config = kvq.parse_scheme(scheme)

    def planned(key: str, value: str) -> int:
        whole = kvq.parse_scheme(f"k={key},v={value},edges={config.edges}")
        return plan_scheme(model, whole, adapter_of(model)).nbytes(5000)

    def around(name: str) -> list[tuple[str, float]]:
        family, at, bits = name.partition("@")
        low = int(float(bits)) if at else 0
        return (
            [(f"{family}{low}", 1 - float(bits) % 1), (f"{family}{low + 1}", float(bits) % 1)] if at else [(name, 1.0)]
        )

    expected = sum(planned(k, v) * p * q for k, p in around(config.key) for v, q in around(config.value))
    assert plan_scheme(model, config, adapter_of(model)).nbytes(5000) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("scheme", "sides"),
    [
        ("tq3", (3.25, 3.25)),
        ("affine4", (5.0, 4.5)),  # scales of framed keys are float32
        ("affine4,frame=off", (4.5, 4.5)),
        ("k=tq4,v=tq2", (4.25, 2.25)),
        ("fp16", (16.0, 16.0)),
    ],
)
def test_bits_of_every_head(scheme: str, sides: tuple[float, float]) -> None:
    model = tiny_models.llama()
    plan = plan_scheme(model, kvq.parse_scheme(scheme), adapter_of(model))
    assert [head_bits(layer) for layer in plan.layers] == [tuple((bits,) * 2 for bits in sides)] * 3


def test_bits_of_heads_with_codecs_of_their_own_and_of_layers_without_keys() -> None:
    model = tiny_models.falcon_h1()
    (layer, *_) = plan_scheme(model, kvq.parse_scheme("tq4,frame=off"), adapter_of(model)).layers
    heads = layer.geometry.kv_heads
    names = [f"tq{1 + i % 3}" for i in range(heads)]
    spec = replace(layer.spec, key="+".join(names))
    keys, values = head_bits(replace(layer, spec=spec))
    assert keys == tuple(float(name[2:]) + 0.25 for name in names) and values == (4.25,) * heads
    assert sum(keys) / heads == pytest.approx(spec.bits_per_element(64, 64)[0])
    nothing = replace(layer, spec=None, geometry=replace(layer.geometry, kv_heads=0))
    assert head_bits(nothing) == ((), ())


def test_the_longest_context_fits_and_one_token_more_does_not() -> None:
    with kvq.compress(tiny_models.llama_sliding(), "tq4") as compression:
        plan = plan_caches(compression.maker)
    budget = plan.peak_nbytes(20_000)
    found = longest_context(plan.peak_nbytes, budget, 1 << 20)
    assert plan.peak_nbytes(found) <= budget < plan.peak_nbytes(found + 1)
    assert 20_000 <= found < 20_100
    assert longest_context(plan.peak_nbytes, budget, 1000) == 1000
    assert longest_context(plan.peak_nbytes, 10, 1000) == 0


# ---- skeletons -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(QWEN3_8B, 8_190_735_360), (LLAMA_70B, 70_553_706_496), (GEMMA3_27B, 27_009_346_304)],
    ids=["qwen3-8b", "llama-70b", "gemma3-27b"],
)
def test_skeletons_have_the_models_parameters_and_take_no_memory(config: dict[str, Any], parameters: int) -> None:
    written = copy.deepcopy(config)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = model_skeleton(config)
    plan = plan_scheme(model, kvq.parse_scheme("tq4"), adapter_of(model))
    weights = estimate_weights(model, config)
    quantized = estimate_weights(model, {**config, "quantization": {"group_size": 64, "bits": 4}})
    assert weights.parameters == quantized.parameters == parameters
    assert weights.nbytes == 2 * parameters and weights.bits == 16.0
    assert 4.5 <= quantized.bits < 4.51  # codes, and a 16-bit scale and bias a group; norms are not quantized
    assert plan.nbytes(4096) > 0
    assert mx.get_peak_memory() - before < 20e6
    assert config == written  # mlx-lm's classes write into what they are given


def test_dense_bytes_of_large_models() -> None:
    def bytes_at(config: dict[str, Any], tokens: int) -> int:
        model = model_skeleton(config)
        return plan_scheme(model, kvq.parse_scheme("fp16"), adapter_of(model)).nbytes(tokens)

    assert bytes_at(QWEN3_8B, 8192) == 8192 * 36 * 8 * 128 * 2 * 2
    assert bytes_at(LLAMA_70B, 131072) == 131072 * 327_680
    assert bytes_at(GEMMA3_27B, 32768) == (10 * 32768 + 52 * 1024) * 16 * 128 * 2 * 2


def test_gemma3_has_an_output_layer_of_its_own_if_the_config_says_so() -> None:
    untied = model_skeleton({**GEMMA3_27B, "tie_word_embeddings": False})
    assert estimate_weights(untied, GEMMA3_27B).parameters == 27_009_346_304 + 262_208 * 5376


def test_quantization_by_layer() -> None:
    config = {**tiny_models.BASE, "model_type": "llama", "head_dim": 64, "torch_dtype": "float16"}
    plain = {"group_size": 64, "bits": 4}
    eight = {"group_size": 64, "bits": 8}
    sizes = [
        estimate_weights(model_skeleton(config), {**config, "quantization": quantization}).nbytes
        for quantization in (plain, {**plain, "lm_head": eight}, {**plain, "lm_head": False})
    ]
    head = tiny_models.VOCAB * tiny_models.BASE["hidden_size"]
    assert sizes[1] - sizes[0] == head // 2
    assert sizes[2] - sizes[0] == head * 2 - head // 2 - head // 64 * 4


def test_facts_of_configs() -> None:
    assert model_dtype({"dtype": "float32"}) == model_dtype({"text_config": {"torch_dtype": "float32"}}) == mx.float32
    assert model_dtype({}) == mx.bfloat16
    assert trained_positions({"text_config": {"max_position_embeddings": 77}}) == 77
    assert trained_positions({}) is None


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "model_type"),
        ({"model_type": "nosuch"}, "nosuch"),
        ({"model_type": "llama"}, "'llama'"),
        ({**LLAMA_70B, "model_file": "model.py"}, "'model.py'"),
    ],
)
def test_configs_that_make_no_model_are_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        model_skeleton(config)
