"""Generation on real text: mlx-lm's answers, transformers' streamers and pipeline structure, stop strings, loading."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from refusals import message_of
from transformers import AutoTokenizer, GenerationConfig, TextIteratorStreamer, TextStreamer

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.errors import DemoModelError, GenerationError

PROMPT = "The lighthouse keeper wrote in her journal that the"


@pytest.fixture
def lm(real_model: Any) -> Iterator[kvq.CausalLM]:
    model, tokenizer = real_model("smollm2")
    with kvq.compress(model, "tq4"):
        yield kvq.CausalLM(model, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with a generation config of its own."""
    made = tmp_path_factory.mktemp("models") / "smollm2"
    made.mkdir()
    for file in kvq.demo_model_path("smollm2", progress=False).iterdir():
        (made / file.name).symlink_to(file)
    fields = {
        "max_new_tokens": 6,
        "do_sample": True,
        "temperature": 0.5,
        "eos_token_id": [2, 0],
        "_from_model_config": True,
    }
    (made / "generation_config.json").write_text(json.dumps({**fields, "transformers_version": "4.42.3"}))
    return made


def test_importing_generation_imports_no_model_and_no_torch() -> None:
    code = (
        "import sys, mlx_kvq_plugin as kvq; kvq.CausalLM, kvq.PromptCache, kvq.pipeline; "
        "print(*(m for m in sys.modules if m == 'torch' or m.startswith(('transformers.generation', "
        "'transformers.pipelines', 'transformers.models'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain = subprocess.run(
        [
            sys.executable,
            "-c",
            code.replace("mlx_kvq_plugin as kvq; kvq.CausalLM, kvq.PromptCache, kvq.pipeline", "mlx_lm"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == plain.stdout and "torch" not in done.stdout.split()


@pytest.mark.real_model
@pytest.mark.parametrize("scheme", ["fp16", "tq3", "rvq1,edges=1"])
def test_answers_are_those_of_mlx_lm_generate(scheme: str, real_model: Any) -> None:
    model, tokenizer = real_model("smollm2")
    with kvq.compress(model, scheme):
        lm = kvq.CausalLM(model, tokenizer)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Name three colours."}], add_generation_prompt=True
        )
        for ids, text in ((chat, chat), (lm.encode(PROMPT), PROMPT)):
            expected = mlx_lm.generate(model, tokenizer, text, max_tokens=32)
            tokens = [int(t) for t, _ in generate_step(mx.array(ids), model, max_tokens=32)]
            output = lm.generate(ids, max_new_tokens=32)[0].tolist()[len(ids) :]
            ended = [t in tokenizer.eos_token_ids for t in tokens]
            assert output == tokens[: ended.index(True) + 1 if any(ended) else None]
            assert tokenizer.decode(output, skip_special_tokens=True).lstrip() == expected.lstrip()


@pytest.mark.real_model
def test_a_batch_from_transformers_tokenizer(lm) -> None:
    tokenizer = AutoTokenizer.from_pretrained(kvq.demo_model_path("smollm2", progress=False), padding_side="left")
    texts = [PROMPT, "Once", "def fibonacci(n):\n    if n"]
    inputs = tokenizer(texts, padding=True, return_tensors="np")
    assert (inputs["attention_mask"] == 0).any()
    output = lm.generate(**inputs, max_new_tokens=16)
    for row, text in zip(output.tolist(), texts, strict=True):
        alone = lm.generate(tokenizer(text)["input_ids"], max_new_tokens=16)[0].tolist()
        new = row[inputs["input_ids"].shape[1] :]
        assert new[: len(alone)] == alone[-16:][: len(new)] and len(set(new)) > 4


@pytest.mark.real_model
def test_text_streamers_of_transformers(lm, capsys) -> None:
    ids = lm.encode(PROMPT)
    output = lm.generate(ids, max_new_tokens=20, streamer=TextStreamer(lm.tokenizer))
    whole = lm.tokenizer.decode(output[0].tolist())
    assert capsys.readouterr().out == whole + "\n"
    lm.generate(ids, max_new_tokens=20, streamer=TextStreamer(lm.tokenizer, skip_prompt=True))
    assert PROMPT + capsys.readouterr().out == whole + "\n"
    streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=lm.generate, args=(ids,), kwargs={"max_new_tokens": 20, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join([PROMPT, *pieces]) == whole and sum(map(bool, pieces)) > 5


@pytest.mark.real_model
def test_streamers_get_numpy_arrays_and_an_end(lm) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: Any) -> None:
            assert isinstance(value, np.ndarray)
            self.seen.append(value.tolist())

        def end(self) -> None:
            self.seen.append("end")

    ids = lm.encode("one two three four")
    both = [ids, ids[::-1]]
    recorder = Recorder()
    output = lm.generate(both, max_new_tokens=5, streamer=recorder, eos_token_id=None).tolist()
    assert recorder.seen == [both, *map(list, zip(*(row[len(ids) :] for row in output), strict=True)), "end"]
    with pytest.raises(ValueError, match="batch size 1"):
        lm.generate(both, max_new_tokens=5, streamer=TextStreamer(lm.tokenizer))
    recorder = Recorder()
    stops = [lambda tokens, scores: 1 / 0]
    with pytest.raises(ZeroDivisionError):
        lm.generate(ids, streamer=recorder, stopping_criteria=stops)
    assert recorder.seen[-1] == "end"  # who waits for text is not left waiting


@pytest.mark.real_model
def test_stop_strings_end_in_the_last_token(lm) -> None:
    ids = lm.encode(PROMPT)
    free = lm.generate(ids, max_new_tokens=40)[0].tolist()
    text = lm.tokenizer.decode(free[len(ids) :])
    for stop in (text[20:24], text[31:45], text[50:51]):
        for stops in (stop, ["never to be seen", stop]):
            tokens = lm.generate(ids, max_new_tokens=40, stop_strings=stops, tokenizer=lm.tokenizer)[0].tolist()
            assert tokens == free[: len(tokens)]
            assert stop in lm.tokenizer.decode(tokens[len(ids) :])
            assert stop not in lm.tokenizer.decode(tokens[len(ids) : -1])
    # what the prompt holds already does not stop, but what begins in it does
    assert lm.generate(ids, max_new_tokens=3, stop_strings="journal").shape[1] == len(ids) + 3
    across = PROMPT[-5:] + lm.tokenizer.decode(free[len(ids) : len(ids) + 1])
    assert lm.generate(ids, max_new_tokens=3, stop_strings=across).shape[1] == len(ids) + 1


@pytest.mark.real_model
def test_a_prompt_cache_from_text(lm, tmp_path) -> None:
    cache = lm.prefill(PROMPT)
    ids = lm.encode(PROMPT)
    assert cache.token_ids == ids
    cache.save(tmp_path / "journal.safetensors")
    loaded = kvq.PromptCache.load(tmp_path / "journal.safetensors", lm)
    plain = lm.generate(ids, max_new_tokens=24).tolist()
    for held in (cache.fork(), loaded, cache):
        assert lm.generate(ids, past_key_values=held, max_new_tokens=24).tolist() == plain
    info = kvq.read_prompt_cache_info(tmp_path / "journal.safetensors")
    assert info.token_ids == tuple(ids[:-1]) and info.tokens == len(ids) - 1  # as mlx-lm and kvq expect of a file


# ---- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_from_pretrained_reads_the_generation_config(folder) -> None:
    lm = kvq.AutoModelForCausalLM.from_pretrained(folder, kv_scheme="tq3", dtype="float32")
    assert lm.scheme == "tq3" and isinstance(lm.generation_config, GenerationConfig)
    assert lm.model.model.layers[0].mlp.gate_proj.weight.dtype == mx.float32
    ids = lm.encode(PROMPT)
    with_file = [lm.generate(ids, seed=seed).tolist() for seed in (1, 1, 2)]
    assert with_file[0] == with_file[1] != with_file[2]
    assert {len(row[0]) for row in with_file} == {len(ids) + 6}
    greedy = lm.generate(ids, do_sample=False)
    assert mx.array_equal(greedy, lm.generate(ids, do_sample=False, seed=5))
    pipe = kvq.pipeline("text-generation", lm)
    (record,) = pipe(PROMPT, seed=1)
    assert record["generated_text"] == PROMPT + lm.tokenizer.decode(
        with_file[0][0][len(ids) :], skip_special_tokens=True
    )


@pytest.mark.real_model
def test_without_a_generation_config_the_tokenizers_end_tokens_are_taken(lm) -> None:
    assert lm.generation_config.eos_token_id == sorted(lm.tokenizer.eos_token_ids)
    assert lm.generation_config.max_new_tokens is None


@pytest.mark.real_model
def test_loading_that_cannot_work_says_so(folder) -> None:
    with pytest.raises(kvq.KVQError, match="from_pretrained"):
        kvq.AutoModelForCausalLM()
    with pytest.raises(kvq.KVQError, match="tq9"):
        kvq.AutoModelForCausalLM.from_pretrained(folder, kv_scheme="tq9")
    with pytest.raises(GenerationError, match="dtype must be one of"):
        kvq.AutoModelForCausalLM.from_pretrained(folder, dtype="float8")


def test_models_that_cannot_be_found_are_refused_in_one_sentence(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nAn error happened")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    said = message_of(lambda: kvq.AutoModelForCausalLM.from_pretrained("nobody/nothing"))
    assert "'nobody/nothing'" in said and "Name or service not known" in said and "demo:smollm2" in said
    monkeypatch.undo()
    assert "'/no/such/model'" in message_of(lambda: kvq.AutoModelForCausalLM.from_pretrained("/no/such/model"))
    with pytest.raises(DemoModelError, match="smollm2, gemma3, but got 'gpt'"):
        kvq.AutoModelForCausalLM.from_pretrained("demo:gpt")


# ---- pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_a_pipeline_returns_what_transformers_returns(lm) -> None:
    pipe = kvq.pipeline("text-generation", model=lm, do_sample=False, max_new_tokens=8)

    def answer(prompt: str) -> str:
        ids = lm.encode(prompt)
        return lm.tokenizer.decode(lm.generate(ids, max_new_tokens=8)[0].tolist()[len(ids) :], skip_special_tokens=True)

    assert pipe(PROMPT) == [{"generated_text": PROMPT + answer(PROMPT)}]
    assert pipe(PROMPT, return_full_text=False) == [{"generated_text": answer(PROMPT)}]
    assert pipe([PROMPT, "Once"]) == [pipe(PROMPT), pipe("Once")]
    ids = lm.encode(PROMPT)
    assert pipe(PROMPT, return_tensors=True) == [
        {"generated_token_ids": lm.generate(ids, max_new_tokens=8)[0].tolist()}
    ]
    drawn = pipe(PROMPT, num_return_sequences=3, do_sample=True, seed=1)
    assert len(drawn) == len({record["generated_text"] for record in drawn}) == 3

    chat = [{"role": "user", "content": "Say hello."}]
    (record,) = pipe(chat)
    assert record["generated_text"][:1] == chat and record["generated_text"][1]["role"] == "assistant"
    said = record["generated_text"][1]["content"]
    assert pipe(chat, return_full_text=False) == [{"generated_text": said}] and said and "<|" not in said
    assert pipe([chat, chat]) == [[record], [record]]
    begun = [*chat, {"role": "assistant", "content": said[:4]}]
    (longer,) = pipe(begun)
    assert longer["generated_text"][-1]["role"] == "assistant" and len(longer["generated_text"]) == 2
    assert longer["generated_text"][-1]["content"].startswith(said[:4])
    assert len(pipe(begun, continue_final_message=False)[0]["generated_text"]) == 3
    ids = lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert said == lm.tokenizer.decode(
        lm.generate(ids, max_new_tokens=8)[0].tolist()[len(ids) :], skip_special_tokens=True
    )


@pytest.mark.real_model
def test_defaults_of_a_pipeline_are_transformers(lm, monkeypatch) -> None:
    seen: list[dict[str, Any]] = []

    def generate(ids: Any, **arguments: Any) -> mx.array:
        seen.append(arguments)
        return mx.array([ids])

    monkeypatch.setattr(lm, "generate", generate)
    kvq.pipeline(model=lm)(PROMPT)
    kvq.pipeline(model=lm)(PROMPT, do_sample=False, max_length=99)
    kvq.pipeline(model=lm, temperature=0.2)(PROMPT, generation_config=GenerationConfig(max_new_tokens=5))
    assert seen[0] == {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
    assert seen[1] == {"do_sample": False, "max_length": 99}
    assert {k: v for k, v in seen[2].items() if k != "generation_config"} == {
        "max_new_tokens": 5,
        "do_sample": True,
        "temperature": 0.2,
    }


@pytest.mark.real_model
def test_what_a_pipeline_cannot_do_is_one_sentence(lm) -> None:
    pipe = kvq.pipeline(model=lm)
    for wrong in (3, [3], [PROMPT, 3], [{"content": "x"}]):
        with pytest.raises(GenerationError, match="text_inputs must be"):
            pipe(wrong)
    with pytest.raises(GenerationError, match="task of a pipeline"):
        kvq.pipeline("summarization", model=lm)
    with pytest.raises(GenerationError, match="given a model"):
        kvq.pipeline()
    with pytest.raises(GenerationError, match="num_beams"):
        pipe(PROMPT, num_beams=3)
    with pytest.raises(GenerationError, match="with a tokenizer"):
        kvq.pipeline(model=kvq.CausalLM(lm.model))
