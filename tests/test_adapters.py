"""Model adapters and compression of whole models: exact with lossless codecs, undone without a trace."""

from __future__ import annotations

import copy
import sys
from functools import cache
from types import FunctionType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache, trim_prompt_cache
from tiny_models import ADAPTED, VOCAB, WINDOW

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import routing
from mlx_kvq_plugin.adapters import FULL, SLIDING, list_adapters, load_adapter
from mlx_kvq_plugin.cache import KVQCache
from mlx_kvq_plugin.config import LayerSpec
from mlx_kvq_plugin.errors import SchemeError, UnsupportedModelError
from mlx_kvq_plugin.loading import compression_of
from mlx_kvq_plugin.rotary import turn
from mlx_kvq_plugin.routing import NAME, RoutedAttention
from mlx_kvq_plugin.sliding import SlidingKVQCache

MODELS = pytest.mark.parametrize("name", list(ADAPTED))
UNEVEN = [50, 3, 100, 40]
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 257))


@cache
def model_of(name: str) -> Any:
    return ADAPTED[name]()


def module_of(model: Any) -> dict[str, Any]:
    """Globals of the file that defines the model's attention."""
    return vars(sys.modules[type(model.layers[0].self_attn).__module__])


@pytest.fixture(autouse=True)
def _every_route_is_undone() -> Any:
    """A test that leaves a module routed would change the ones after it."""
    yield
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models."):
            assert vars(module).get(NAME, scaled_dot_product_attention) is scaled_dot_product_attention


def run(model: Any, sizes: list[int], batch: int = 1, caches: Any = None, start: int = 0) -> tuple[mx.array, list[Any]]:
    """Logits of all tokens, fed in calls of `sizes` tokens, and the caches."""
    caches = make_prompt_cache(model) if caches is None else caches
    outputs = []
    for size in sizes:
        outputs.append(model(mx.array(TOKENS[:batch, start : start + size]), cache=caches))
        mx.eval(outputs[-1])
        start += size
    return mx.concatenate(outputs, axis=1), caches


@cache
def stock_logits(name: str, batch: int, steps: int) -> mx.array:
    return run(model_of(name), UNEVEN + [1] * steps, batch)[0]


def steps_error(found: mx.array, expected: mx.array) -> float:
    """RMS difference of the logits of the single steps over their RMS."""
    a, b = (np.array(x).astype(np.float64)[:, sum(UNEVEN) :] for x in (found, expected))
    return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))


def packed(caches: list[Any]) -> list[int]:
    return [c.packed_tokens for c in caches if isinstance(c, KVQCache)]


# ---- logits ------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("batch", [1, 2])
def test_lossless_codecs_give_the_logits_of_mlx_lm_bit_for_bit(name, batch):
    model = model_of(name)
    expected = stock_logits(name, batch, 64)
    with kvq.compress(model, "identity"):
        found, caches = run(model, UNEVEN + [1] * 64, batch)
    assert all(isinstance(c, KVQCache) for c in caches) and min(packed(caches)) > 100
    assert sum(UNEVEN) > WINDOW
    assert mx.array_equal(found, expected)


@MODELS
def test_lossy_codecs_stay_close_and_more_bits_are_closer(name):
    model, expected = model_of(name), stock_logits(name, 1, 64)[:, : sum(UNEVEN) + 6]
    errors = []
    for scheme in ("tq6", "tq4", "tq2"):
        with kvq.compress(model, scheme):
            found, caches = run(model, UNEVEN + [1] * 6)
        assert len(packed(caches)) == len(model.layers) and min(packed(caches)) > 100
        errors.append(steps_error(found, expected))
    assert 1e-3 < errors[0] < errors[1] / 2 < errors[2] / 4
    assert errors[0] < 0.1 and errors[1] < 0.35


@pytest.mark.parametrize(
    ("scheme", "low", "high"), [("rvq1", 0.3, 0.7), ("affine4", 0.05, 0.3), ("k=tq4,v=tq2", 0.2, 0.5)]
)
def test_other_schemes_cost_what_their_bits_say(scheme, low, high):
    model = model_of("llama")
    with kvq.compress(model, scheme):
        found, caches = run(model, UNEVEN + [1] * 6)
    assert min(packed(caches)) > 100
    assert low < steps_error(found, stock_logits("llama", 1, 64)[:, : sum(UNEVEN) + 6]) < high


def test_the_key_frame_removes_the_error_of_large_key_biases():
    model, expected = model_of("qwen2"), stock_logits("qwen2", 1, 64)[:, : sum(UNEVEN) + 6]
    errors = []
    for scheme in ("tq4", "tq4,frame=off"):
        with kvq.compress(model, scheme):
            errors.append(steps_error(run(model, UNEVEN + [1] * 6)[0], expected))
    assert errors[0] < 0.7 * errors[1]


def test_a_model_goes_on_after_trimming_as_if_nothing_had_been_there():
    model = model_of("llama")
    for scheme in ("identity", "tq4"):
        with kvq.compress(model, scheme):
            expected, _ = run(model, [150, 1, 1, 1])
            _, caches = run(model, [150])
            for _ in range(3):
                model(mx.array([[5, 6, 7]]), cache=caches)
                assert trim_prompt_cache(caches, 3) == 3
            found, _ = run(model, [1, 1, 1], caches=caches, start=150)
        np.testing.assert_allclose(np.array(found), np.array(expected[:, 150:]), atol=2e-4)


# ---- what is reported about each layer ---------------------------------------------------------------------------


@MODELS
def test_the_plan_says_what_each_layer_becomes_and_matches_the_tensors_it_sees(name, monkeypatch):
    model = model_of(name)
    seen = []
    original = routing.attend

    def spy(args: Any) -> mx.array:
        values = args.cache.dense_values.shape
        seen.append((args.cache, args.queries.shape, args.cache.dense_keys.shape, values, args.mask))
        return original(args)

    monkeypatch.setattr(routing, "attend", spy)
    with kvq.compress(model, "k=tq4,v=tq2,recent=16") as compression:
        plans = compression.maker.plan()
        _, caches = run(model, [100])
    assert [plan.index for plan in plans] == list(range(len(model.layers)))
    assert [one[0] for one in seen] == caches
    stock = make_prompt_cache(model)
    for plan, layer, made, before, (_, queries, keys, values, _) in zip(
        plans, model.layers, caches, stock, seen, strict=True
    ):
        geometry = plan.geometry
        assert plan.reason == made.kvq_note == ""
        assert geometry.attention is layer.self_attn and geometry.rope is layer.self_attn.rope
        assert (geometry.heads, geometry.key_dim) == (queries[1], queries[3])
        assert (geometry.kv_heads, geometry.key_dim, geometry.value_dim) == (keys[1], keys[3], values[3])
        sliding = isinstance(before, RotatingKVCache)
        assert geometry.kind == (SLIDING if sliding else FULL) and geometry.window == (WINDOW if sliding else None)
        assert type(made) is (SlidingKVQCache if sliding else KVQCache)
        assert not sliding or made.max_size == WINDOW
        assert plan.spec == LayerSpec("tq4", "tq2", recent=16)
        assert made.spec == plan.spec.with_(sinks=0 if sliding else 4)
        assert made.rotary == plan.rotary and made.route == type(layer.self_attn).__module__


@MODELS
def test_the_rotation_read_off_each_rope_turns_like_it(name):
    model = model_of(name)
    with kvq.compress(model, "tq4") as compression:
        plans = compression.maker.plan()
    for plan in plans:
        x = mx.array(np.random.default_rng(1).standard_normal((1, 1, 70, plan.geometry.key_dim)).astype(np.float32))
        assert plan.rotary is not None and plan.rotary.pairs > 0
        for start in (0, 5000):
            expected = plan.geometry.rope(x, offset=start)
            np.testing.assert_allclose(np.array(turn(plan.rotary, x, start, 70)), np.array(expected), atol=0.01)


def test_ropes_of_different_layers_are_told_apart():
    with kvq.compress(model_of("gemma3_text"), "tq4") as compression:
        rotaries = [plan.rotary for plan in compression.maker.plan()]
    assert rotaries[0] == rotaries[1] == rotaries[3] != rotaries[2]
    with kvq.compress(model_of("phi3_longrope"), "tq4") as compression:
        assert compression.maker.plan()[0].rotary.magnitude == pytest.approx(1.19, abs=0.005)


def test_a_rope_that_is_not_one_rotation_is_reported_and_removes_a_plain_mean():
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    model = tiny_models.llama(rope_scaling=scaling, max_position_embeddings=512, num_hidden_layers=1)
    expected, _ = run(model, [100])
    with kvq.compress(model, "tq4") as compression:
        [plan] = compression.maker.plan()
        found, [made] = run(model, [100])
    assert plan.rotary is None and plan.reason == made.kvq_note
    assert plan.reason.startswith("key frame removes a plain mean: its rope is not one rotation for all positions")
    assert mx.array_equal(found, expected) and made.packed_tokens > 0 and made.rotary.pairs == 0


# ---- which layers stay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_sliding", "gemma3_text"])
@pytest.mark.parametrize("edges", [0, 1, 2, 3, 9])
def test_edges_leave_that_many_first_and_last_layers_to_mlx_lm(name, edges):
    model = model_of(name)
    with kvq.compress(model, f"tq4,edges={edges}") as compression:
        caches, plans = compression.maker(), compression.maker.plan()
    stock = make_prompt_cache(model)
    for i, (made, before, plan) in enumerate(zip(caches, stock, plans, strict=True)):
        stays = min(i, len(stock) - 1 - i) < edges
        assert (type(made) is type(before)) == stays == (plan.spec is None)
        assert made.kvq_note == (f"edge layer (edges={edges})" if stays else "")


def test_layers_left_to_mlx_lm_and_compressed_ones_work_side_by_side():
    model = model_of("gemma3_text")
    with kvq.compress(model, "identity,edges=1"):
        found, caches = run(model, UNEVEN + [1] * 10)
    assert [type(c) for c in caches] == [RotatingKVCache, SlidingKVQCache, KVQCache, RotatingKVCache]
    assert mx.array_equal(found, stock_logits("gemma3_text", 1, 64)[:, : sum(UNEVEN) + 10])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_fp16_leaves_every_layer_to_mlx_lm(name):
    model = model_of(name)
    with kvq.compress(model, "fp16") as compression:
        assert module_of(model)[NAME] is scaled_dot_product_attention
        found, caches = run(model, UNEVEN)
        assert [type(c) for c in caches] == [type(c) for c in compression.maker.original()]
    assert all(c.kvq_note == "scheme fp16 leaves every layer to mlx-lm" for c in caches)
    assert mx.array_equal(found, stock_logits(name, 1, 64)[:, : sum(UNEVEN)])


def test_windows_too_small_to_pack_stay_and_say_so():
    kinds = ["full_attention", "sliding_attention"]
    model = tiny_models.llama(num_hidden_layers=2, layer_types=kinds, sliding_window=100)
    with kvq.compress(model, "tq4") as compression:
        full, sliding = compression.maker()
    assert type(full) is KVQCache and type(sliding) is RotatingKVCache
    assert sliding.kvq_note == "a window of 100 tokens is too small to pack (below 136)"


# ---- undoing -----------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("way", ["with", "undo", "error"])
def test_undoing_restores_every_attribute_and_global(name, way):
    model = model_of(name)
    module = module_of(model)
    before, attributes, keys = dict(module), dict(model.__dict__), list(model)
    maker = getattr(model, "make_cache", None)
    if way == "undo":
        compression = kvq.compress(model, "tq4")
        assert isinstance(module[NAME], RoutedAttention) and compression_of(model) is compression.maker
        compression.undo()
        compression.undo()
    elif way == "with":
        with kvq.compress(model, "tq4") as compression:
            run(model, [80, 1])
    else:
        with pytest.raises(ZeroDivisionError), kvq.compress(model, "tq4"):
            raise ZeroDivisionError
    assert module.keys() == before.keys() and all(module[key] is before[key] for key in before)
    assert model.__dict__.keys() == attributes.keys() and list(model) == keys
    assert all(model.__dict__[key] is attributes[key] for key in attributes)
    assert getattr(model, "make_cache", None) == maker  # bound methods are equal, not the same object
    assert compression_of(model) is None


def test_a_make_cache_set_on_the_model_itself_is_used_and_put_back():
    model = tiny_models.llama()

    def make_cache() -> list[Any]:
        return [KVCache(), RotatingKVCache(max_size=WINDOW), KVCache()]

    model.make_cache = make_cache
    with kvq.compress(model, "tq4") as compression:
        assert [type(c) for c in compression.maker()] == [KVQCache, RotatingKVCache, KVQCache]
        assert compression.maker.plan()[1].reason == "mlx-lm gives this full layer a RotatingKVCache"
    assert model.make_cache is make_cache


def test_two_models_of_one_file_are_compressed_and_undone_independently():
    first, second = tiny_models.llama(seed=3), tiny_models.llama(seed=4)
    module = module_of(first)
    expected, _ = run(first, [90, 1])
    expected_second, _ = run(second, [90, 1])
    one = kvq.compress(first, "tq2")
    assert mx.array_equal(run(second, [90, 1])[0], expected_second)  # not compressed, but routed
    two = kvq.compress(second, "identity")
    assert type(run(first, [90, 1])[1][0]) is type(run(second, [90, 1])[1][0]) is KVQCache
    one.undo()
    assert isinstance(module[NAME], RoutedAttention) and compression_of(first) is None
    assert mx.array_equal(run(first, [90, 1])[0], expected)
    found, caches = run(second, [90, 1])
    assert mx.array_equal(found, expected_second) and min(packed(caches)) > 0
    one.undo()
    assert isinstance(module[NAME], RoutedAttention)
    two.undo()
    assert module[NAME] is scaled_dot_product_attention


def test_a_cache_that_outlives_its_compression_fails_loudly():
    model = model_of("llama")
    with kvq.compress(model, "tq4"):
        _, caches = run(model, [90])
    with pytest.raises((TypeError, ValueError)):
        run(model, [1], caches=caches, start=90)


def test_compressing_twice_is_refused_and_changes_nothing():
    model = model_of("llama")
    with kvq.compress(model, "tq4") as compression:
        routed = module_of(model)[NAME]
        with pytest.raises(UnsupportedModelError, match="compressed once"):
            kvq.compress(model, "tq2")
        assert model.make_cache is compression.maker and module_of(model)[NAME] is routed and routed.users == 1
    with kvq.compress(model, "tq2") as compression:
        assert compression.maker.scheme == "tq2"


def test_a_wrong_scheme_is_refused_before_anything_changes():
    model = model_of("llama")
    attributes = dict(model.__dict__)
    with pytest.raises(SchemeError):
        kvq.compress(model, "tq9")
    assert model.__dict__ == attributes


# ---- architectures without an adapter ----------------------------------------------------------------------------


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones():
    model = tiny_models.seed_oss()
    with pytest.raises(UnsupportedModelError) as caught:
        kvq.compress(model, "tq4")
    assert "'seed_oss'" in str(caught.value) and 'unknown_arch="generic"' in str(caught.value)
    for known in list_adapters():
        assert known in str(caught.value)
        assert load_adapter(known).name
    assert {"llama", "mistral", "falcon3", "qwen2", "qwen3", "gemma3_text", "gemma3", "phi3"} <= set(list_adapters())
    with pytest.raises(UnsupportedModelError, match='"error" or "generic", got \'try\''):
        kvq.compress(model, "tq4", unknown_arch="try")


def test_the_generic_adapter_serves_layers_like_llamas():
    model = tiny_models.seed_oss()
    expected, _ = run(model, UNEVEN + [1] * 6)
    with kvq.compress(model, "identity", unknown_arch="generic") as compression:
        found, caches = run(model, UNEVEN + [1] * 6)
        assert compression.maker.adapter.name == "generic"
    assert min(packed(caches)) > 100 and mx.array_equal(found, expected)
    with kvq.compress(model, "tq4", unknown_arch="generic"):
        found, caches = run(model, UNEVEN + [1] * 6)
    assert min(packed(caches)) > 100 and 1e-3 < steps_error(found, expected) < 0.4


def test_a_known_architecture_keeps_its_adapter_under_generic():
    with kvq.compress(model_of("qwen3"), "tq4", unknown_arch="generic") as compression:
        assert compression.maker.adapter.name == "qwen3"


def test_the_generic_adapter_refuses_an_architecture_that_computes_its_own_attention():
    model = tiny_models.gemma2(model_type="gemma2_of_tomorrow")
    module = module_of(model)
    before, attributes = dict(module), dict(model.__dict__)
    with pytest.raises(UnsupportedModelError, match="model adapter of its own"):
        kvq.compress(model, "tq4", unknown_arch="generic")
    assert all(module[key] is before[key] for key in before) and module.keys() == before.keys()
    assert model.__dict__ == attributes


def test_the_generic_check_notices_logits_that_differ():
    model = tiny_models.seed_oss()

    def altered(queries: mx.array, keys: Any, values: Any, **others: Any) -> mx.array:
        return scaled_dot_product_attention(queries, keys, values, **others) * 1.001

    module = module_of(model)
    module[NAME] = altered  # stands for a file that wraps the attention: routing would lose what it does
    try:
        with pytest.raises(UnsupportedModelError, match="equal logits"):
            kvq.compress(model, "tq4", unknown_arch="generic")
        assert module[NAME] is altered and "make_cache" not in model.__dict__
    finally:
        module[NAME] = scaled_dot_product_attention


# ---- copies and mlx-lm's generation ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_a_copied_model_stays_compressed_and_makes_caches_of_its_own(name):
    model = ADAPTED[name]()
    with kvq.compress(model, "tq4,edges=1"):
        expected, _ = run(model, [100, 1, 1])
        copied = copy.deepcopy(model)
        assert compression_of(copied) is not compression_of(model) and compression_of(copied).model is copied
        assert not isinstance(vars(copied)["make_cache"], FunctionType)
        found, caches = run(copied, [100, 1, 1])
        assert mx.array_equal(found, expected) and min(packed(caches)) > 0
        attention = compression_of(copied).plan()[1].geometry.attention
        assert attention is copied.layers[1].self_attn and attention is not model.layers[1].self_attn


def test_a_copied_model_does_not_make_its_caches_through_the_one_it_was_copied_from():
    model = tiny_models.llama()
    with kvq.compress(model, "tq4"):
        copied = copy.deepcopy(model)
        assert compression_of(copied).original.__self__ is copied
        assert compression_of(model).original.__self__ is model


def generated(model: Any, prompt: int, count: int, **arguments: Any) -> tuple[list[int], mx.array]:
    steps = generate_step(mx.array(TOKENS[0, :prompt]), model, max_tokens=count, **arguments)
    tokens, logprobs = zip(*steps, strict=True)
    return list(tokens), mx.stack(logprobs)


@MODELS
def test_generation_with_lossless_caches_equals_that_of_mlx_lm(name):
    model = model_of(name)
    tokens, logprobs = generated(model, 200, 12, prefill_step_size=64)
    with kvq.compress(model, "identity"):
        caches = make_prompt_cache(model)
        found, found_logprobs = generated(model, 200, 12, prefill_step_size=64, prompt_cache=caches)
    assert found == tokens and mx.array_equal(found_logprobs, logprobs)
    assert min(packed(caches)) > 100


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("scheme", ["identity", "tq4"])
def test_prompt_caches_copied_in_the_middle_of_generation_go_on_alike(name, scheme):
    model = model_of(name)
    with kvq.compress(model, scheme):
        _, caches = run(model, [190, 1, 1, 1])
        copied = copy.deepcopy(caches)
        first, _ = run(model, [1] * 20, caches=caches, start=193)
        other, _ = run(model, [30, 1], caches=copy.deepcopy(copied), start=100)
        second, _ = run(model, [1] * 20, caches=copied, start=193)
    assert mx.array_equal(first, second) and not mx.array_equal(other[:, -1], second[:, -1])


@pytest.mark.parametrize("draft_seed", [0, 5], ids=["draft that agrees", "draft that does not"])
def test_speculative_generation_with_lossless_caches_equals_greedy_generation(draft_seed):
    model, draft = model_of("llama"), tiny_models.llama(seed=draft_seed, num_hidden_layers=2 + (draft_seed == 0))
    expected, _ = generated(model, 120, 24)
    with kvq.compress(model, "identity"), kvq.compress(draft, "identity"):
        caches = make_prompt_cache(model) + make_prompt_cache(draft)
        steps = speculative_generate_step(
            mx.array(TOKENS[0, :120]), model, draft, num_draft_tokens=3, max_tokens=24, prompt_cache=caches
        )
        tokens, _, from_draft = zip(*steps, strict=True)
    assert list(tokens) == expected
    assert (sum(from_draft) > 12) == (draft_seed == 0)
    assert min(packed(caches)) > 60
    assert {c.offset for c in caches[:3]} == {120 + 24 - 1} or {c.offset for c in caches[:3]} == {120 + 24}
