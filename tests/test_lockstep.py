"""Runs in lockstep compute what they compute alone, up to the rounding of products of another shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.contenders import Contender, make_contender
from mlx_kvq_plugin.lockstep import can_join, joint_chunk, joint_logits, lockstep, lockstep_modules
from mlx_kvq_plugin.ruler import ROUTES, measure

JOINT = ("llama_sliding", "gemma3_text", "gpt_oss", "qwen3_moe", "phi3_longrope", "cohere2", "gemma4")
APART = ("qwen3_next", "gemma2", "gemma3n", "gemma4_text", "falcon_h1", "llama4", "nemotron_h")
SCHEMES = ["tq4", "rvq1,edges=1", "k=affine8,v=tq3", "mlx-affine8"]


def tokens(rows: int, count: int) -> mx.array:
    return mx.array(np.random.RandomState(3).randint(1, 64, (rows, count)))


def modules_of(model: Any) -> list[dict[str, Any]]:
    with kvq.compress(model, ROUTES) as compression:
        return lockstep_modules(compression.maker)


@contextmanager
def in_lockstep(model: Any) -> Iterator[None]:
    with kvq.compress(model, ROUTES) as compression, lockstep(lockstep_modules(compression.maker)):
        yield


def contenders(model: Any, schemes: list[str]) -> list[Contender]:
    found = []
    for scheme in ["fp16", *schemes]:
        try:
            found.append(make_contender(model, scheme))
        except kvq.KVQError:
            assert scheme.startswith("mlx-affine")
    return found


@pytest.mark.parametrize("name", JOINT)
def test_joint_steps_and_chunks_equal_single_ones(name):
    model = getattr(tiny_models, name)()
    schemes = SCHEMES[:3] if name == "gpt_oss" else SCHEMES  # mlx-lm's quantized caches take no attention sinks
    runs, given = contenders(model, schemes), tokens(2, 184)
    alone = [run.copied() for run in runs]
    assert all(can_join(run.caches) for run in runs)
    with in_lockstep(model):
        joint_chunk(model, [run.caches for run in runs], given[:, :176])
        for run, single in zip(runs, alone, strict=True):
            run.end_chunk()
            single.prefill(model, given[:, :176])
            assert same_states(run, single), run.scheme
        for i in range(176, 184):
            new = given[:, i : i + 1]
            joint = joint_logits(model, [run.caches for run in runs], mx.stack([new] * len(runs)))
            single_logits = [single.step(model, new) for single in alone]
            for run, found, expected in zip(runs, joint, single_logits, strict=True):
                error = mx.max(mx.abs(found - expected)) / mx.max(mx.abs(expected))
                assert error.item() < 1e-5, (run.scheme, i)
    assert len({run.nbytes for run in runs}) > 2


def same_states(one: Contender, other: Contender) -> bool:
    pairs = zip(one.caches, other.caches, strict=True)
    arrays = [zip(tree_flatten(a.state), tree_flatten(b.state), strict=True) for a, b in pairs]
    return all(
        mx.array_equal(x, y).item() if isinstance(x, mx.array) else x == y
        for layer in arrays
        for (_, x), (_, y) in layer
    )


@pytest.mark.parametrize("name", APART)
def test_models_whose_layers_do_more_are_left_out(name):
    assert modules_of(getattr(tiny_models, name)()) == []


def test_what_cannot_join_runs_one_by_one():
    model, texts = tiny_models.falcon_h1(), {"one": tokens(1, 80)[0].tolist()}
    joint, apart = (list(measure(model, texts, ["tq4"], prefill=76, steps=4, joint=joint)) for joint in (True, False))
    assert joint == apart and not joint[0].error


def test_unknown_models_run_one_by_one():
    with kvq.compress(tiny_models.seed_oss(), ROUTES, unknown_arch="generic") as compression:
        assert lockstep_modules(compression.maker) == []


def test_only_known_kinds_of_caches_join():
    assert can_join([KVCache(), RotatingKVCache(8)])
    assert not can_join([KVCache(), ArraysCache(2)])


def test_different_masks_are_refused():
    model = tiny_models.llama()
    runs = [run.caches for run in contenders(model, ["tq4"])]
    with in_lockstep(model):
        model(tokens(1, 5), cache=runs[0])
        runs[1][0].make_mask = lambda *_, **__: mx.array([True])
        with pytest.raises(kvq.KVQError, match="must have the same mask, got different ones; run them one by one"):
            joint_logits(model, runs, tokens(2, 1)[:, None])


def test_models_outside_lockstep_are_served_as_before():
    model = tiny_models.llama()
    expected = model(tokens(1, 20), cache=kvq.make_prompt_cache(model))
    with in_lockstep(model):
        caches = [KVCache() for _ in model.layers]
        assert mx.array_equal(model(tokens(1, 20), cache=caches), expected)
