"""Calibrations: what they hold, their files, where they are found, and models that use them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import safetensors
import tiny_models
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HTTPError
from local_hub import Hub, local_hub
from mlx_lm.generate import batch_generate
from safetensors.numpy import load_file, save_file
from test_cli import model_folder

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.allocation import ACTIVATION, GRADIENT, KEY, SIDES, VALUE
from mlx_kvq_plugin.calibration import calibration_sequences
from mlx_kvq_plugin.calibration_files import FILE_NAME
from mlx_kvq_plugin.corpus import corpus_text
from mlx_kvq_plugin.errors import AllocationError, CalibrationError
from mlx_kvq_plugin.loading import LayerPlan
from mlx_kvq_plugin.planning import adapter_of, plan_scheme

PROMPT = list(range(1, 90))
METADATA = "kvq_calibration"


def refused(call: Callable[[], object], *fragments: str) -> None:
    """A `CalibrationError` of one sentence that has the fragments."""
    with pytest.raises(CalibrationError) as caught:
        call()
    text = str(caught.value)
    assert ". " not in text and "\n" not in text
    for fragment in fragments:
        assert fragment in text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a calibration; copy it to change it."""
    folder = model_folder(tmp_path_factory.mktemp("models") / "tiny")
    model, tokenizer = mlx_lm.load(str(folder))
    found = kvq.calibrate(model, tokenizer, sequences=3, length=128, source=str(folder))
    kvq.save_calibration(folder / FILE_NAME, found)
    return folder


@pytest.fixture(scope="module")
def calibration(tiny: Path) -> kvq.Calibration:
    return kvq.load_calibration(tiny / FILE_NAME)


@pytest.fixture
def model(tiny: Path) -> Any:
    return mlx_lm.load(str(tiny))[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with local_hub(monkeypatch, tmp_path / "cache") as found:
        yield found


def plans_of(model: Any) -> list[LayerPlan]:
    """What a compressed model does to its layers."""
    maker = kvq.compression_of(model)
    assert maker is not None
    return maker.plan()


def bits_of(plan: LayerPlan, side: str, family: str = "tq") -> list[int]:
    """Of every KV head."""
    names = getattr(plan.spec, side).split("+")
    if len(names) == 1:
        names *= plan.geometry.kv_heads
    assert len(names) == plan.geometry.kv_heads
    return [int(name.removeprefix(family)) for name in names]


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_a_calibration_has_every_head_of_every_layer(calibration: kvq.Calibration) -> None:
    assert calibration.layers() == list(calibration.attention) == [0, 1, 2]
    assert (calibration.sequences, calibration.length, calibration.sinks, calibration.recent) == (3, 128, 4, 16)
    for kind in (GRADIENT, ACTIVATION):
        own = calibration.components(kind, calibration.layers())
        assert {(c.layer, c.head, c.side) for c in own} == {(i, h, s) for i in range(3) for h in (0, 1) for s in SIDES}
        assert all(c.weight > 0 and c.elements == 64 for c in own)
    assert calibration.components(GRADIENT, [0]) != calibration.components(ACTIVATION, [0])
    families = {family for family, _ in calibration.curves}
    assert {"tq", "rvq", "affine", "tqprod"} <= families and "identity" not in families
    assert ("tqprod", VALUE) not in calibration.curves  # for keys only
    for side in SIDES:  # random heads are nearly Gaussian
        assert calibration.curves["tq", side].measured(3) == pytest.approx(0.0345, rel=0.15)
        assert calibration.curves["tq", side].beta == pytest.approx(3.65, rel=0.05)
    keys, values = (calibration.curves["tq", side].measured(1) for side in SIDES)
    least = 1 - 2 / np.pi  # the squared error of a bit; scales that keep norms or leave values unbiased add to it
    assert keys == pytest.approx(2 - 2 * (1 - least) ** 0.5, rel=0.1)
    assert values == pytest.approx(least / (1 - least), rel=0.1)


def test_equal_seeds_give_equal_calibrations(tiny: Path, calibration: kvq.Calibration) -> None:
    loaded, tokenizer = mlx_lm.load(str(tiny))
    again = kvq.calibrate(loaded, tokenizer, sequences=3, length=128, source=str(tiny))
    assert again == calibration
    other = kvq.calibrate(loaded, tokenizer, sequences=3, length=128, source=str(tiny), seed=1)
    assert other.sensitivities[ACTIVATION] == calibration.sensitivities[ACTIVATION]
    assert other.sensitivities[GRADIENT] != calibration.sensitivities[GRADIENT]
    assert other.corpus == calibration.corpus


def test_weights_are_means_over_the_sequences(tiny: Path) -> None:
    loaded, tokenizer = mlx_lm.load(str(tiny))
    texts = [corpus_text("prose")[:400], corpus_text("code")[:400]]
    steps = []
    both = kvq.calibrate(
        loaded,
        tokenizer,
        texts=texts,
        sequences=2,
        length=128,
        progress=lambda what, step, of: steps.append((step, of)),
    )
    alone = [kvq.calibrate(loaded, tokenizer, texts=[text], sequences=1, length=128) for text in texts]
    for layer, heads in both.sensitivities[ACTIVATION][KEY].items():
        parts = [one.sensitivities[ACTIVATION][KEY][layer] for one in alone]
        assert heads == pytest.approx(np.mean(parts, axis=0).tolist())
    for family, side in both.curves:  # of both texts
        parts = [one.curves[family, side].measured(3) for one in alone if 3 in both.curves[family, side].bits]
        assert not parts or both.curves[family, side].measured(3) == pytest.approx(np.mean(parts), rel=1e-4)
    assert steps == [(0, 2), (1, 2), (2, 2)] and both.corpus not in {one.corpus for one in alone}
    assert both.model == "mlx_lm.models.llama"


class Numbers:
    """A tokenizer for texts of numbers; -1 begins a text if it is told so."""

    def __init__(self, first: bool):
        self.bos_token_id = -1 if first else None

    def encode(self, text: str) -> list[int]:
        return [*([-1] if self.bos_token_id else []), *map(int, text.split())]


def test_sequences_come_from_every_text_in_turn_and_are_spread_over_it() -> None:
    texts = [" ".join(map(str, range(start, start + 300))) for start in (0, 1000, 2000)]
    found = calibration_sequences(Numbers(False), texts, 7, 128)
    assert [ids[0] for ids in found] == [0, 1000, 2000, 86, 1172, 2172, 172]
    assert all(ids == list(range(ids[0], ids[0] + 128)) for ids in found)
    assert [ids[0] for ids in calibration_sequences(Numbers(False), [*texts[:2], "too short"], 2, 128)] == [0, 1000]


def test_every_sequence_has_the_first_token_of_texts() -> None:
    found = calibration_sequences(Numbers(True), [" ".join(map(str, range(300)))], 2, 128)
    assert [ids[:3] for ids in found] == [[-1, 0, 1], [-1, 173, 174]] and all(len(ids) == 128 for ids in found)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"length": 127}, "at least 128 tokens, got 3 of 127"),
        ({"sequences": 0}, "got 0 of 128"),
        ({"texts": [corpus_text("prose"), "short"]}, "got 5 in text 2"),
        ({"length": 20000}, "at least 20000 tokens"),
    ],
)
def test_too_little_text_is_refused(tiny: Path, arguments: dict[str, Any], fragment: str) -> None:
    loaded, tokenizer = mlx_lm.load(str(tiny))
    refused(lambda: kvq.calibrate(loaded, tokenizer, **{"sequences": 3, "length": 128, **arguments}), fragment)


def test_sensitivities_that_are_not_numbers_are_refused(tiny: Path) -> None:
    loaded, tokenizer = mlx_lm.load(str(tiny))
    loaded.model.layers[1].self_attn.v_proj.weight = mx.full((128, 128), mx.nan)
    refused(lambda: kvq.calibrate(loaded, tokenizer, sequences=1, length=128), "must be finite", "nan")


def test_unknown_architectures_can_be_calibrated_too(tiny: Path) -> None:
    tokenizer = mlx_lm.load(str(tiny))[1]
    loaded = tiny_models.seed_oss()
    with pytest.raises(kvq.KVQError, match="'seed_oss'"):
        kvq.calibrate(loaded, tokenizer, sequences=1, length=128)
    found = kvq.calibrate(loaded, tokenizer, sequences=1, length=128, unknown_arch="generic")
    assert found.layers() == [0, 1]


def test_a_model_without_layers_to_compress_is_refused(tiny: Path) -> None:
    loaded = tiny_models.llama_sliding()
    for layer in loaded.model.layers:
        layer.use_sliding = True
    loaded.make_cache = lambda: [mlx_lm.models.cache.RotatingKVCache(32, keep=4) for _ in range(4)]
    refused(lambda: kvq.calibrate(loaded, mlx_lm.load(str(tiny))[1], sequences=1, length=128), "got none")


# ---- models whose layers differ --------------------------------------------------------------------------------------


def calibrated(model: Any, tiny: Path, tmp_path: Path, **arguments: Any) -> tuple[kvq.Calibration, str]:
    """A calibration of a model, and the part of a scheme that names its file."""
    tokenizer = mlx_lm.load(str(tiny))[1]
    kvq.save_calibration(
        tmp_path / "own.safetensors",
        kvq.calibrate(model, tokenizer, **{"sequences": 1, "length": 200, **arguments}),
    )
    return kvq.load_calibration(tmp_path / "own.safetensors"), f"calibration={tmp_path / 'own.safetensors'}"


@pytest.mark.parametrize(
    "name", ["gemma3_text", "gemma3n", "gemma4_text", "falcon_h1", "qwen3_5", "mistral3", "llama4"]
)
def test_only_the_layers_that_are_compressed_are_calibrated_and_used(name: str, tiny: Path, tmp_path: Path) -> None:
    model = tiny_models.ARCHITECTURES[name]()
    found, part = calibrated(model, tiny, tmp_path)
    with kvq.compress(model, f"tq@3,{part}") as compression:
        plans = [plan for plan in compression.maker.plan() if plan.spec is not None]
        caches = compression.maker()
        tokens = mx.array([[i % 95 + 1 for i in range(200)]])
        logits = [model(tokens, cache=caches), *(model(tokens[:, :1], cache=caches) for _ in range(3))]
        assert all(mx.all(mx.isfinite(x)).item() for x in logits)
        report = kvq.cache_report(caches)
    assert found.layers() == [plan.index for plan in plans] and set(found.layers()) <= set(found.attention)
    dims = [(plan, KEY, plan.geometry.key_dim) for plan in plans]
    dims += [(plan, VALUE, plan.geometry.value_dim) for plan in plans]
    elements = sum(plan.geometry.kv_heads * dim for plan, _, dim in dims)
    assert all(found.elements[side][plan.index] == dim for plan, side, dim in dims)
    assert sum(sum(bits_of(plan, side)) * dim for plan, side, dim in dims) == 3 * elements  # exact, by elements
    other = found.allocate(kvq.parse_scheme("tq@2.25")).bits
    left = 2.25 * elements - sum(sum(other[side][plan.index]) * dim for plan, side, dim in dims)
    assert 0 <= left < min(dim for _, _, dim in dims)
    assert [layer.index for layer in report.layers if layer.applied] == found.layers()
    assert sum(layer.packed for layer in report.layers) > 0


def test_edges_get_no_bits_and_the_others_keep_the_average(tiny: Path, tmp_path: Path) -> None:
    model = tiny_models.gemma3_text()
    found, part = calibrated(model, tiny, tmp_path)
    with kvq.compress(model, f"tq@2.5,edges=1,{part}") as compression:
        plans = compression.maker.plan()
    assert [plan.spec is None for plan in plans] == [True, False, False, True]
    assert sum(b for plan in plans[1:3] for side in SIDES for b in bits_of(plan, side)) == 8 * 2.5
    assert found.layers(1) == [1, 2]
    own = found.allocate(kvq.parse_scheme("tq@2.5,edges=1"))  # as kvq inspect shows it
    assert [own.codec(side, i) for i in (1, 2) for side in SIDES] == [
        codec for plan in plans[1:3] if plan.spec is not None for codec in (plan.spec.key, plan.spec.value)
    ]
    with kvq.compress(model, "tq@2.5,edges=9") as compression:  # nothing is left to be calibrated
        assert all(plan.spec is None for plan in compression.maker.plan())
    with pytest.raises(AllocationError, match="for at least one component"):
        found.allocate(kvq.parse_scheme("tq@2.5,edges=9"))


def test_edges_are_those_of_all_attention_layers(calibration: kvq.Calibration) -> None:
    """Of a model with attention layers that stay, such as windows too small to pack."""
    sparse = replace(calibration, attention=(0, 1, 2, 5), elements={s: {1: 64, 2: 64} for s in SIDES})
    assert sparse.layers() == sparse.layers(1) == [1, 2] and sparse.layers(2) == []


# ---- use -------------------------------------------------------------------------------------------------------------


def test_a_calibrated_model_generates_saves_and_resumes(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = kvq.load(str(tiny), kv_scheme="tq@2.5")
    plans = plans_of(model)
    assert sum(b for plan in plans for side in SIDES for b in bits_of(plan, side)) == 12 * 2.5
    caches = kvq.make_prompt_cache(model)
    logits = model(mx.array([PROMPT]), cache=caches)
    report = kvq.cache_report(caches)
    assert [layer.applied for layer in report.layers] == [plan.spec.label for plan in plans]
    assert len({layer.applied for layer in report.layers}) > 1
    assert all(label in str(report) for label in {layer.applied for layer in report.layers})
    file = tmp_path / "prompt.safetensors"
    info = kvq.save_prompt_cache(file, caches, model=model, token_ids=PROMPT)
    assert info.scheme == "tq@2.5"
    resumed, _ = kvq.load_prompt_cache(file, model)
    token = mx.argmax(logits[:, -1:], axis=-1)
    for _ in range(24):  # past the next packing
        expected, found = model(token, cache=caches), model(token, cache=resumed)
        assert mx.array_equal(expected, found)
        token = mx.argmax(found[:, -1:], axis=-1)
    assert mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=30)


def test_batches_give_what_sequences_give_alone(tiny: Path) -> None:
    model, tokenizer = kvq.load(str(tiny), kv_scheme="tq@2.5")
    prompts = [PROMPT, PROMPT[::-1][:70]]
    batch = batch_generate(model, tokenizer, prompts, max_tokens=12, verbose=False)
    alone = [batch_generate(model, tokenizer, [ids], max_tokens=12, verbose=False).texts[0] for ids in prompts]
    assert batch.texts == alone


def test_packed_bytes_are_those_of_the_average(tiny: Path, model: Any) -> None:
    """Two codecs of a layer take as many bytes as one between them."""
    sizes = {}
    for scheme in ("tq@3", "tq3", "tq@2.5"):
        with kvq.compress(model, scheme, source=str(tiny)) as compression:
            caches = compression.maker()
            mx.eval(model(mx.array([[i % 95 + 1 for i in range(300)]]), cache=caches))
            sizes[scheme] = kvq.cache_report(caches).nbytes
    packed = 300 - 20
    assert sizes["tq@3"] == sizes["tq3"]
    assert sizes["tq3"] - sizes["tq@2.5"] == packed * 12 * 64 // 16


SPLITS = {
    "k=tq@3,v=tq@2": {KEY: 3, VALUE: 2},
    "k=tq@3,v=tq4": {KEY: 3},
    "k=affine8,v=rvq@1.5": {VALUE: 1.5},
    "k=tq@4,v=fp16": {KEY: 4},
}


@pytest.mark.parametrize("scheme", SPLITS)
def test_sides_have_averages_of_their_own(scheme: str, tiny: Path, calibration: kvq.Calibration) -> None:
    model, _ = kvq.load(str(tiny), kv_scheme=scheme)
    config, plans = kvq.parse_scheme(scheme), plans_of(model)
    for side, name in ((KEY, config.key), (VALUE, config.value)):
        if side in SPLITS[scheme]:
            family = name.partition("@")[0]
            assert sum(b for plan in plans for b in bits_of(plan, side, family)) == SPLITS[scheme][side] * 6
        else:
            assert {getattr(plan.spec, side) for plan in plans} == {"identity" if name == "fp16" else name}
    assert set(calibration.allocate(config).bits) == set(SPLITS[scheme])


def test_allocation_by_activations_is_another_one(tiny: Path) -> None:
    plans = {}
    for kind in (GRADIENT, ACTIVATION):
        model, _ = kvq.load(str(tiny), kv_scheme=f"tq@3,sensitivity={kind}")
        plans[kind] = [plan.spec for plan in plans_of(model)]
    assert plans[GRADIENT] != plans[ACTIVATION]


def test_plans_without_weights_have_as_many_bytes(tiny: Path) -> None:
    model, _ = kvq.load(str(tiny), kv_scheme="tq@2.5")
    caches = kvq.make_prompt_cache(model)
    mx.eval(model(mx.array([[i % 95 + 1 for i in range(299)]]), cache=caches), model(mx.array([[1]]), cache=caches))
    plain = mlx_lm.load(str(tiny))[0]
    plan = plan_scheme(plain, kvq.parse_scheme("tq@2.5"), adapter_of(plain), itemsize=4)
    assert plan.nbytes(300, steps=1) == kvq.cache_report(caches).nbytes


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_the_calibration_and_says_what_it_is(
    calibration: kvq.Calibration, tiny: Path, tmp_path: Path
) -> None:
    kvq.save_calibration(tmp_path / "a.safetensors", calibration)
    assert kvq.load_calibration(str(tmp_path / "a.safetensors")) == calibration
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        header = json.loads(file.metadata()[METADATA])
    assert header["version"] == 1 and header["model"] == "tiny"  # not the path
    assert (header["sinks"], header["recent"], header["attention"]) == (4, 16, [0, 1, 2])
    assert str(tiny.parent) not in json.dumps(header)
    assert set(load_file(tmp_path / "a.safetensors")) == {
        f"{kind}.{side}.{layer}" for kind in (GRADIENT, ACTIVATION) for side in SIDES for layer in range(3)
    }
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it


def test_a_folder_that_cannot_be_written_is_named(calibration: kvq.Calibration, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "a.safetensors", tmp_path / "file" / "a.safetensors", Path("/proc/a.safetensors")):
        refused(lambda path=path: kvq.save_calibration(path, calibration), "can be written", str(path))
    (tmp_path / "folder.safetensors").mkdir()
    refused(lambda: kvq.save_calibration(tmp_path / "folder.safetensors", calibration), "folder.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """A calibration file with another header or other arrays."""
    arrays = load_file(source)
    with safetensors.safe_open(source, framework="numpy") as file:
        header = json.loads(file.metadata()[METADATA])
    changed = change(header, arrays)
    save_file(arrays, target, metadata={METADATA: json.dumps(header if changed is None else changed)})
    return target


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "newer version": (lambda header, _: header.update(version=2), "version 1 or less, got 2"),
    "no version": (lambda header, _: header.pop("version") and None, "KeyError ('version')"),
    "a list": (lambda *_: [], "TypeError"),
    "no curves": (lambda header, _: header.update(curves=3), "TypeError"),
    "bad curve": (lambda header, _: header["curves"][0].update(mse=[0.1]), "positive errors"),
    "missing layer": (lambda _, arrays: arrays.pop("gradient.key.1").fill(0), "of some layers only"),
    "missing side": (lambda _, arrays: [arrays.pop(f"gradient.value.{i}") for i in range(3)] and None, "KeyError"),
    "not a number": (lambda _, arrays: arrays["gradient.key.1"].fill(np.nan), "must be finite"),
    "foreign array": (lambda _, arrays: arrays.update(weight=np.zeros(2, np.float32)), "ValueError"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_damaged_files_are_refused(case: str, tiny: Path, tmp_path: Path) -> None:
    change, fragment = CHANGES[case]
    path = rewritten(tiny / FILE_NAME, tmp_path / "bad.safetensors", change)
    with pytest.raises(kvq.KVQError, match=re.escape(fragment)):
        kvq.load_calibration(path)


def test_files_that_are_no_calibrations_are_refused(tiny: Path, tmp_path: Path) -> None:
    refused(lambda: kvq.load_calibration(tmp_path / "none.safetensors"), "must exist", "none.safetensors")
    refused(lambda: kvq.load_calibration(tmp_path), "must exist")
    refused(lambda: kvq.load_calibration(tiny / "model.safetensors"), "another safetensors file", "model.safetensors")
    refused(lambda: kvq.load_calibration(tiny / "config.json"), "SafetensorError", "config.json")
    whole = (tiny / FILE_NAME).read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        refused(lambda: kvq.load_calibration(tmp_path / "cut.safetensors"), "complete", "cut.safetensors")


# ---- which model, and where the file is ------------------------------------------------------------------------------


def test_a_missing_calibration_is_one_sentence_with_the_command(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny, folder)
    (folder / FILE_NAME).unlink()
    refused(lambda: kvq.load(str(folder), kv_scheme="tq@2.5"), f"next to {folder}", f"with: kvq calibrate {folder}")
    model = tiny_models.llama()
    refused(lambda: kvq.compress(model, "tq@2.5"), f"kvq calibrate MODEL --out {FILE_NAME}", f"calibration={FILE_NAME}")
    assert kvq.compression_of(model) is None
    missing = tmp_path / "none.safetensors"
    refused(lambda: kvq.load(str(tiny), kv_scheme=f"tq@2.5,calibration={missing}"), "must exist", str(missing))
    refused(lambda: kvq.load(str(tiny), kv_scheme=f"tq@2.5,calibration={folder}"), f"got none in {folder}")


def test_a_calibration_of_another_model_is_refused(tiny: Path, model: Any) -> None:
    part = f"calibration={tiny / FILE_NAME}"
    refused(
        lambda: kvq.compress(tiny_models.llama(seed=1), f"tq@2.5,{part}"), "own weights", "of tiny", "kvq calibrate"
    )
    weight = model.model.layers[1].mlp.down_proj.weight
    model.model.layers[1].mlp.down_proj.weight = weight * 1.01
    refused(lambda: kvq.compress(model, f"tq@2.5,{part}"), "own weights")


def test_a_calibration_serves_every_float_dtype(tiny: Path) -> None:
    schemes = []
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        model, _ = mlx_lm.load(str(tiny))
        model.model.layers[0].mlp.down_proj.weight *= 1e-5  # below what float16 holds in full
        model.set_dtype(mx.bfloat16)  # as a checkpoint holds it
        if dtype == mx.float32:
            part = calibrated(model, tiny, tiny.parent, length=128)[1]
        model.set_dtype(dtype)
        with kvq.compress(model, f"tq@2.5,{part}") as compression:
            caches = compression.maker()
            logits = model(mx.array([PROMPT]), cache=caches)
            assert logits.dtype == dtype and mx.all(mx.isfinite(logits)).item()
            schemes.append([plan.spec for plan in compression.maker.plan()])
    assert schemes[0] == schemes[1] == schemes[2]


def test_a_quantized_model_is_calibrated_as_it_is_and_used_in_float32(tiny: Path, tmp_path: Path) -> None:
    model, _ = mlx_lm.load(str(tiny))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, _: "proj" in path)
    _, part = calibrated(model, tiny, tmp_path, length=128)
    model.set_dtype(mx.float32)
    with kvq.compress(model, f"tq@2.5,{part}") as compression:
        assert len({plan.spec for plan in compression.maker.plan()}) > 1


def test_calibrations_are_found_next_to_the_model(tiny: Path, tmp_path: Path) -> None:
    assert kvq.find_calibration(str(tiny)) == tiny / FILE_NAME
    assert kvq.find_calibration(str(tmp_path)) is None and kvq.find_calibration("") is None
    refused(lambda: kvq.find_calibration("a/b/c"), "'a/b/c'", "calibration=FILE")
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(tiny / FILE_NAME, other)
    (bare := tmp_path / "bare").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, bare)
    for place in (other, other / FILE_NAME):
        model, _ = kvq.load(str(bare), kv_scheme=f"tq@3,calibration={place}")
        assert kvq.compression_of(model) is not None


def test_a_calibration_is_pushed_to_a_repository_and_found_there(tiny: Path, hub: Hub, model: Any) -> None:
    hub.files["me/tiny"] = {}
    assert kvq.find_calibration("me/tiny") is None
    refused(
        lambda: kvq.compress(model, "tq@2.5", source="me/tiny"),
        f"next to me/tiny; make one with: kvq calibrate me/tiny --out {FILE_NAME} (and add calibration={FILE_NAME} ",
    )
    address = kvq.push_calibration(tiny / FILE_NAME, "me/tiny", token="hf_secret")
    assert address.startswith(f"{hub.address}/me/tiny/commit/")
    assert hub.files["me/tiny"] == {FILE_NAME: (tiny / FILE_NAME).read_bytes()}
    assert hub.messages == ["Calibration of tiny for mlx-kvq-plugin"] and hub.tokens == {"hf_secret"}
    found = kvq.find_calibration("me/tiny")
    assert found is not None and found.is_relative_to(constants.HF_HUB_CACHE)
    assert kvq.load_calibration(found) == kvq.load_calibration(tiny / FILE_NAME)
    for scheme, source in (("tq@2.5", "me/tiny"), ("tq@2.5,calibration=me/tiny", "")):
        with kvq.compress(model, scheme, source=source) as compression:
            assert len({plan.spec for plan in compression.maker.plan()}) > 1


def test_a_folder_of_the_hubs_cache_stands_for_its_repository(tiny: Path, hub: Hub) -> None:
    """Servers and tools hand on the folder that mlx-lm downloaded."""
    hub.files["me/tiny"] = {name: (tiny / name).read_bytes() for name in ("config.json", FILE_NAME)}
    folder = Path(hf_hub_download("me/tiny", "config.json")).parent
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    found = kvq.find_calibration(str(folder))
    assert found == folder / FILE_NAME and kvq.load_calibration(found).model == "tiny"
    hub.files["me/other"] = {"config.json": b"{}"}
    assert kvq.find_calibration(str(Path(hf_hub_download("me/other", "config.json")).parent)) is None


def test_offline_a_repository_has_what_is_in_the_cache(
    tiny: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    hub.files["me/tiny"] = {FILE_NAME: (tiny / FILE_NAME).read_bytes()}
    hub.files["me/other"] = dict(hub.files["me/tiny"])
    assert kvq.find_calibration("me/tiny") is not None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert kvq.find_calibration("me/tiny") is not None and kvq.find_calibration("me/other") is None
    refused(lambda: kvq.compress(model, "tq@2.5", source="me/other"), "kvq calibrate me/other --out")
    refused(lambda: kvq.push_calibration(tiny / FILE_NAME, "me/tiny"), "OfflineModeIsEnabled", "'me/tiny'")


def test_refused_pushes_are_one_sentence(tiny: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def push(repository: str = "me/tiny", file: Path = tiny / FILE_NAME) -> str:
        return kvq.push_calibration(file, repository, token="hf_secret")

    refused(push, "RepositoryNotFoundError", "'me/tiny'", "your token")
    refused(lambda: push("not a name"), "HFValidationError", "'not a name'")
    refused(lambda: push(file=tmp_path / "none.safetensors"), "must exist")
    refused(lambda: push(file=tiny / "model.safetensors"), "written by kvq calibrate")
    hub.files["me/tiny"], hub.refusal = {}, (403, "You have no write access to this. Ask for it.")
    refused(push, "403", "You have no write access to this")
    assert hub.files["me/tiny"] == {}

    def unreachable(*_: object, **__: object) -> None:
        raise HTTPError("connection refused")

    monkeypatch.setattr(HfApi, "upload_file", unreachable)
    refused(push, "HTTPError (connection refused)")


def test_a_repository_that_refuses_is_named(hub: Hub) -> None:
    refused(lambda: kvq.find_calibration("me/none"), "RepositoryNotFoundError", "'me/none'", "calibration=FILE")


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_a_calibrated_average_is_better_than_equal_bits(
    real_model: Callable[[str], tuple[Any, Any]], text_ids: Callable[[Any, int], list[int]], tmp_path: Path
) -> None:
    model, tokenizer = real_model("smollm2")
    kvq.save_calibration(tmp_path / "a.safetensors", kvq.calibrate(model, tokenizer, sequences=3, length=128))
    ids, prefill = text_ids(tokenizer, 184), 160

    def logprobs() -> mx.array:
        return kvq.step_logprobs(model, kvq.make_prompt_cache(model), ids, prefill)

    reference, kl = logprobs(), {}
    for scheme in ("tq3", f"tq@3,calibration={tmp_path / 'a.safetensors'}"):
        with kvq.compress(model, scheme):
            kl[scheme[:3]] = kvq.compare(reference, logprobs(), ids[prefill:]).kl_mean
    assert kl["tq@"] < 0.7 * kl["tq3"]
