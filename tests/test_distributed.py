"""Two ranks on the ring backend over 127.0.0.1: the same tokens as one rank, prompt caches per rank, clear refusals.

The tests start this file as a program, once per rank: `python test_distributed.py JOB FOLDER` writes what it found to
`FOLDER/JOB.rank<r>.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils as mlx_utils
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import errors
from mlx_kvq_plugin.distributed import Placement, rankless

LIMIT = 55  # seconds until ranks that wait for each other are ended
PROMPT = [(7 * i * i + 3 * i) % tiny_models.VOCAB for i in range(90)]
FIRST, MORE = 10, 10  # tokens generated before and after saving
SPLITS = {"tensor": "llama", "pipeline": "qwen2"}
SCHEMES = ("identity", "tq4", "tq4,edges=1")


# ---- what every rank does ------------------------------------------------------------------------------------------


def generated(model: Any, cache: list[Any], prompt: list[int], count: int) -> list[int]:
    """Greedy tokens; the cache then holds the prompt and all of them."""
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache, prefill_step_size=40)
    return [int(token) for token, _ in steps]


def error_of(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except errors.KVQError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def sharded(folder: Path, split: str, scheme: str = "tq4") -> Any:
    group = mx.distributed.init(strict=True, backend="ring")
    model, _ = kvq.sharded_load(str(folder / SPLITS[split]), scheme, **{f"{split}_group": group})
    return model


def plain_part(folder: Path) -> Any:
    """As mlx-lm loads it."""
    group = mx.distributed.init(strict=True, backend="ring")
    return mlx_utils.sharded_load(str(folder / "llama"), tensor_group=group)[0]


def generate_and_save(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for split in SPLITS:
        for scheme in SCHEMES:
            model = sharded(folder, split, scheme)
            cache = kvq.make_prompt_cache(model)
            tokens = generated(model, cache, PROMPT, FIRST)
            report = kvq.cache_report(cache)
            found[f"{split} {scheme}"] = {
                "tokens": tokens,
                "layers": len(cache),
                "applied": [layer.applied for layer in report.layers],
                "nbytes": report.nbytes,
                "placement": [kvq.placement_of(model).rank, kvq.placement_of(model).ranks],
            }
            if scheme == "tq4":
                token_ids = [*PROMPT, *tokens]
                info = kvq.save_prompt_cache(folder / f"{split}.safetensors", cache, model=model, token_ids=token_ids)
                rank = kvq.placement_of(model).rank
                other = {"save": "another" if rank else "one"}
                kvq.save_prompt_cache(folder / f"{split}-mixed.safetensors", cache, model=model, metadata=other)
                if rank == 0:  # as when one of the machines could not write
                    kvq.save_prompt_cache(folder / f"{split}-half.safetensors", cache, model=model)
                found[f"{split} info"] = [info.format, info.rank, info.ranks, info.sharding, info.tokens]
    found["auto"] = [
        error_of(kvq.sharded_load, str(folder / "llama"), "auto@3"),
        error_of(kvq.compress, plain_part(folder), "auto@3"),
    ]
    found["heads"] = error_of(kvq.sharded_load, str(folder / "three-heads"))
    return found


def resume(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for split in SPLITS:
        model = sharded(folder, split)
        for name in ("one-rank", f"{split}-mixed", f"{split}-half"):
            found[f"{split} {name.removeprefix(split)}"] = error_of(
                kvq.load_prompt_cache, folder / f"{name}.safetensors", model
            )
        other = next(name for name in SPLITS if name != split)
        found[f"{split} other split"] = error_of(kvq.load_prompt_cache, folder / f"{other}.safetensors", model)
        cache, info = kvq.load_prompt_cache(folder / f"{split}.safetensors", model)
        found[split] = generated(model, cache, [info.token_ids[-1]], MORE)
    return found


JOBS = {"generate_and_save": generate_and_save, "resume": resume}


def main(job: str, folder: Path) -> None:
    found = JOBS[job](folder)
    (folder / f"{job}.rank{os.environ['MLX_RANK']}.json").write_text(json.dumps(found))


# ---- starting ranks ------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_ranks(job: str, folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """What every rank wrote; fails with their messages when one fails or all wait longer than `LIMIT`."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
    logs = [folder / f"{job}.rank{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, __file__, job, str(folder)]
            process = subprocess.Popen(
                command, env={**environment, "MLX_RANK": str(rank)}, stdout=output, stderr=subprocess.STDOUT
            )
            processes.append(process)
    deadline = time.monotonic() + LIMIT
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or any(process.poll() for process in processes):
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    messages = "\n".join(log.read_text()[-2000:] for log in logs)
    assert codes == [0] * ranks, f"exit codes {codes} after at most {LIMIT} s\n{messages}"
    return [json.loads((folder / f"{job}.rank{rank}.json").read_text()) for rank in range(ranks)]


def write_model(folder: Path, file: str, config: dict[str, Any]) -> None:
    """A folder that `sharded_load` reads: pipelines look layers up in the index."""
    from test_cli import tokenizer_files

    folder.mkdir()
    weights: dict[str, mx.array] = dict(tree_flatten(tiny_models.build(file, config).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_files(folder, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of both kinds, and a prompt cache that one rank saved."""
    folder = tmp_path_factory.mktemp("distributed")
    write_model(folder / "llama", "llama", {**tiny_models.BASE, "model_type": "llama", "head_dim": 64})
    write_model(folder / "qwen2", "qwen2", {**tiny_models.BASE, "model_type": "qwen2"})
    three = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 192, "head_dim": 64}
    write_model(folder / "three-heads", "llama", {**tiny_models.BASE, "model_type": "llama", **three})
    model, _ = kvq.load(str(folder / "llama"))
    cache = kvq.make_prompt_cache(model)
    generated(model, cache, PROMPT, 1)
    kvq.save_prompt_cache(folder / "one-rank.safetensors", cache, model=model, token_ids=PROMPT)
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> list[dict[str, Any]]:
    return run_ranks("generate_and_save", folder)


@pytest.fixture(scope="module")
def second(folder: Path, first: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return run_ranks("resume", folder)


def on_one_rank(folder: Path, split: str, scheme: str, count: int) -> tuple[list[int], kvq.CacheReport]:
    model, _ = kvq.load(str(folder / SPLITS[split]), scheme)
    cache = kvq.make_prompt_cache(model)
    return generated(model, cache, PROMPT, count), kvq.cache_report(cache)


# ---- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("split", list(SPLITS))
def test_two_ranks_give_the_tokens_of_one_and_share_its_bytes(split, scheme, folder, first):
    tokens, report = on_one_rank(folder, split, scheme, FIRST)
    ranks = [found[f"{split} {scheme}"] for found in first]
    assert [rank["tokens"] for rank in ranks] == [tokens, tokens]
    assert [rank["placement"] for rank in ranks] == [[0, 2], [1, 2]]
    assert sum(rank["nbytes"] for rank in ranks) == report.nbytes
    applied = [layer.applied for layer in report.layers]
    if split == "tensor":
        assert [rank["layers"] for rank in ranks] == [3, 3] and ranks[0]["applied"] == ranks[1]["applied"] == applied
    else:  # rank 0 has the last layers
        assert [rank["layers"] for rank in ranks] == [2, 1] and ranks[1]["applied"] + ranks[0]["applied"] == applied


def test_tokens_that_a_model_chooses_depend_on_the_scheme(folder):
    """Else equal tokens would say nothing about the caches."""
    assert on_one_rank(folder, "tensor", "tq4", FIRST)[0] != on_one_rank(folder, "tensor", "identity", FIRST)[0]


@pytest.mark.parametrize("split", list(SPLITS))
def test_new_processes_resume_what_the_ranks_saved(split, folder, first, second):
    whole, _ = on_one_rank(folder, split, "tq4", FIRST + MORE)
    started = first[0][f"{split} tq4"]["tokens"]
    assert started == whole[:FIRST]
    # mlx-lm feeds the last token too, so the cache holds it and the prompt of the resumed run repeats it
    model, _ = kvq.load(str(folder / SPLITS[split]), "tq4")
    cache = kvq.make_prompt_cache(model)
    generated(model, cache, PROMPT, FIRST)
    expected = generated(model, cache, [started[-1]], MORE)
    assert [found[split] for found in second] == [expected, expected]


@pytest.mark.parametrize("split", list(SPLITS))
def test_files_say_whose_part_they_are_and_mlx_lm_reads_them(split, folder, first):
    from mlx_lm.models import cache as mlx_cache

    assert [found[f"{split} info"] for found in first] == [[2, rank, 2, split, 90 + FIRST] for rank in range(2)]
    assert not (folder / f"{split}.safetensors").exists()
    for rank in range(2):
        path = folder / f"{split}.rank{rank}of2.safetensors"
        info = kvq.verify_prompt_cache(path)
        assert (info.rank, info.ranks, info.sharding) == (rank, 2, split)
        assert len(mlx_cache.load_prompt_cache(str(path))) == info.layers


def test_another_number_of_ranks_is_refused(folder, first, second):
    for split in SPLITS:
        for found in second:
            text = found[f"{split} one-rank"]
            assert text.startswith("PromptCacheModelError: one-rank.safetensors must be resumed with as many ranks")
            assert "got 2 ranks for a file of 1 rank" in text
        model, _ = kvq.load(str(folder / SPLITS[split]))
        for name in (f"{split}.safetensors", f"{split}.rank1of2.safetensors"):
            with pytest.raises(errors.PromptCacheModelError, match="got 1 rank for a file of 2 ranks; start 2 ranks"):
                kvq.load_prompt_cache(folder / name, model)


def test_every_rank_refuses_what_one_of_them_cannot_read(second):
    for split in SPLITS:
        assert "got an error on rank 1" in second[0][f"{split} -half"]
        assert f"rank 1 must find its own file {split}-half.rank1of2" in second[1][f"{split} -half"]
        for found in second:
            assert "must hold the same tokens on every rank" in found[f"{split} -mixed"]
            assert f"got a split by {split}" in found[f"{split} other split"]


def test_heads_that_cannot_be_shared_out_are_refused(first):
    for found in first:
        assert found["heads"].startswith("UnsupportedModelError: a tensor-parallel model must have a multiple of 2")
        assert "num_attention_heads=3" in found["heads"]


def test_automatic_bits_are_refused_on_every_rank(first):
    for found in first:
        for text in found["auto"]:
            assert text.startswith("UnsupportedModelError: a model over several ranks must have a scheme of whole bits")


def test_a_family_of_files_has_one_name():
    whole, part = Placement(), Placement(1, 2, "tensor")
    assert whole.file("a/b.c.safetensors") == Path("a/b.c.safetensors")
    assert part.file("a/b.c.safetensors") == Path("a/b.c.rank1of2.safetensors")
    assert part.file("a/b.c.rank0of3.safetensors") == Path("a/b.c.rank1of2.safetensors")
    assert rankless(Path("a/b.c.rank0of3.safetensors")) == Path("a/b.c.safetensors")
    assert whole.gather(5) == [5]


def test_a_whole_model_has_no_placement_and_no_new_fields_in_its_file(folder):
    model, _ = kvq.load(str(folder / "qwen2"), "fp16")
    assert kvq.placement_of(model) == Placement()
    copied = folder / "copied.safetensors"
    shutil.copy(folder / "one-rank.safetensors", copied)
    header = json.loads(mx.load(str(copied), return_metadata=True)[1]["0.kvq"])
    assert header["format"] == 1 and not {"rank", "ranks", "sharding"} & set(header)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
