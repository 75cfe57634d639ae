"""What this package relies on in mlx-lm and MLX, asserted so that a new release fails here first."""

from __future__ import annotations

import inspect

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models import base, cache, gemma3_text, llama, phi3, qwen2, qwen3

from mlx_kvq_plugin.routing import RoutedAttention


def test_model_files_bind_the_attention_function_by_name():
    for module in (llama, qwen2, qwen3, gemma3_text, phi3):
        bound = module.scaled_dot_product_attention
        if isinstance(bound, RoutedAttention):  # of a model that another test loaded
            bound = bound.original
        assert bound is base.scaled_dot_product_attention
        assert module.Attention.__call__.__globals__ is vars(module)
    parameters = list(inspect.signature(base.scaled_dot_product_attention).parameters)
    assert parameters == ["queries", "keys", "values", "cache", "scale", "mask", "sinks"]


def test_saved_caches_are_rebuilt_by_class_name_and_state():
    source = inspect.getsource(cache.load_prompt_cache)
    assert "globals()[c].from_state(state)" in source
    assert list(inspect.signature(cache._BaseCache.from_state).parameters) == ["state"]
    assert cache.KVQCache.__module__ == "mlx_kvq_plugin.cache"  # registered on import
    assert cache.SlidingKVQCache.__module__ == "mlx_kvq_plugin.sliding"


def test_an_instance_attribute_make_cache_is_honoured():
    source = inspect.getsource(cache.make_prompt_cache)
    assert 'hasattr(model, "make_cache")' in source and "model.make_cache()" in source


def test_stock_rotating_cache_keeps_what_the_sliding_one_copies():
    stock = cache.RotatingKVCache(max_size=8)
    x = mx.arange(20.0).reshape(1, 1, 20, 1)
    keys, _ = stock.update_and_fetch(x[..., :12, :], x[..., :12, :])
    assert keys.shape[2] == 12
    keys, _ = stock.update_and_fetch(x[..., 12:13, :], x[..., 12:13, :])
    assert keys[0, 0, :, 0].tolist() == [12, 5, 6, 7, 8, 9, 10, 11]  # ring order, newest at slot 0
    keys, _ = stock.update_and_fetch(x[..., 13:16, :], x[..., 13:16, :])
    assert keys[0, 0, :, 0].tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14, 15]  # a chunk: in order, window - 1 past


def test_gemma2_still_makes_masks_with_an_axis_less_than_its_scores_in_batches():
    """Why batches of it are right only with this package's attention, also in layers that keep mlx-lm's cache."""
    attention = tiny_models.gemma2(num_hidden_layers=1).layers[0].self_attn
    mask = mx.ones((3, 1, 4, 4), mx.bool_)
    with pytest.raises(ValueError, match="broadcast"):
        attention(mx.zeros((3, 4, 128)), mask)


def test_speculative_decoding_splits_given_caches_by_the_number_of_layers():
    """Wrong for models with fewer caches than layers (gemma3n, gemma4, nemotron_h): give such models no caches."""
    source = inspect.getsource(speculative_generate_step)
    assert "model_cache = prompt_cache[: len(model.layers)]" in source
    assert len(tiny_models.gemma4_text().make_cache()) < len(tiny_models.gemma4_text().layers)


def test_hadamard_transform_is_orthonormal_for_the_sizes_in_use():
    for dim in (64, 80, 96, 112, 128, 192, 256, 512):
        matrix = mx.hadamard_transform(mx.eye(dim))
        assert mx.allclose(matrix @ matrix.T, mx.eye(dim), atol=1e-4), dim


def test_lazy_arrays_cannot_cross_threads_but_evaluated_ones_can():
    import threading

    evaluated = mx.ones(3) * 2
    mx.eval(evaluated)
    results: list[object] = []

    def use(array: mx.array) -> None:
        try:
            results.append((array + 1).tolist())
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=use, args=(evaluated,))
    thread.start()
    thread.join()
    assert results == [[3.0, 3.0, 3.0]]


def test_quantize_refuses_the_head_sizes_that_are_padded():
    for dim in (80, 112):
        with pytest.raises(ValueError, match=r"group_size|divisible"):
            mx.eval(mx.quantize(mx.ones((4, dim)), group_size=32, bits=4))
