"""`kvq serve` over HTTP with the openai client: right answers, true bytes, and a server that stays up."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm
import openai
import pytest
from mlx_lm import server as mlx_server
from mlx_lm.models import llama
from test_cli import model_folder

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin import isolation, served_cache
from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.hook import LoadHook
from mlx_kvq_plugin.prompt_store import PromptStore
from mlx_kvq_plugin.serving import serve
from mlx_kvq_plugin.serving_http import HTTPServer
from mlx_kvq_plugin.serving_report import context_limit

pytestmark = pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended:UserWarning")

CONTEXT = 2048
IDENTITY = "identity"
SYSTEM = (
    "You are a librarian who answers in few words and always tells on which shelf the book is to be found. ",
    "Answer as a pirate would, with much noise and little sense, and end every answer with a question. ",
    "You translate whatever is said into the language of birds, which has no words but many sounds. ",
)
LONG = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 25
WORDS = ("the", "old", "cat", "sat", "under", "tall", "tree", "saw", "how", "seven", "green", "birds", "took", "apple")


# ---- servers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with one token per character."""
    return model_folder(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=CONTEXT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A running server as its clients see it."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def chat(self, *messages: tuple[str, str], **options: Any) -> Any:
        return self.client.chat.completions.create(**request(messages, **options))

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/v1/kvq")
        return found

    def healthy(self) -> bool:
        return bool(self.get("/health") == {"status": "ok"})


def request(messages: Any, **options: Any) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in messages]
    return {"model": "default_model", "messages": messages, "max_tokens": 12, "logprobs": True, **options}


def ids(answer: Any) -> list[int]:
    """The tokens of an answer."""
    return [token.id for token in answer.choices[0].logprobs.content]


@contextmanager
def in_process(folder: Path, scheme: str, *argv: str, store: PromptStore | None = None) -> Iterator[Served]:
    """A server in a thread of this process, so that a test can reach into it."""
    bound: list[ThreadingHTTPServer] = []
    failed: list[BaseException] = []

    class Bound(HTTPServer):
        def server_activate(self) -> None:
            super().server_activate()
            bound.append(self)

    def run() -> None:
        try:
            serve(["--model", str(folder), "--port", "0", *argv], LoadHook(scheme), store, Bound)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not bound and thread.is_alive():
        time.sleep(0.01)
    assert bound, failed
    served = Served(bound[0].server_address[1])
    while not serving_now(served):
        time.sleep(0.01)
    try:
        yield served
    finally:
        bound[0].shutdown()
        bound[0].server_close()
        thread.join(60)
        assert not thread.is_alive() and not failed


def serving_now(served: Served) -> bool:
    try:
        return served.healthy()
    except OSError:
        return False


class Process(Served):
    """A server in a process of its own."""

    def __init__(self, folder: Path | str, *argv: str):
        port = free_port()
        super().__init__(port)
        self.log = ""
        script = Path(sys.executable).with_name("kvq")
        command = [sys.executable, str(script), "serve", str(folder), "--port", str(port), *argv]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        end = time.monotonic() + 60
        while not serving_now(self):
            assert self.process.poll() is None and time.monotonic() < end, self.log
            time.sleep(0.05)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextmanager
def process(folder: Path | str, *argv: str) -> Iterator[Process]:
    served = Process(folder, *argv)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.stop()


# ---- what is right -------------------------------------------------------------------------------------------------


@cache
def plain(folder: str) -> tuple[Any, Any]:
    model, tokenizer = mlx_lm.load(folder)[:2]
    return model, tokenizer


def greedy(folder: Path, messages: Any, scheme: str | None = None, max_tokens: int = 12) -> list[int]:
    """The tokens of one request alone, without a server; of stock mlx-lm without a scheme."""
    model, tokenizer = plain(str(folder))
    messages = [{"role": role, "content": content} for role, content in messages]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def run() -> list[int]:
        return [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=max_tokens)]

    if scheme is None:
        return run()
    with kvq.compress(model, scheme):
        return run()


def sentence(rng: random.Random, words: int = 6) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + "."


# ---- the volume ----------------------------------------------------------------------------------------------------


def test_200_requests_of_8_clients(tiny: Path) -> None:
    """Shared system prompts and growing conversations: no error, stock mlx-lm's tokens, no byte unaccounted for."""
    asked: list[tuple[Any, list[int]]] = []
    cached: list[int] = []
    classes: set[str] = set()
    most = 0

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for talk in range(5):
            messages = [("system", SYSTEM[(seed + talk) % 3])]
            for _ in range(5):
                messages.append(("user", sentence(rng)))
                answer = served.chat(*messages)
                asked.append((tuple(messages), ids(answer)))
                cached.append(answer.usage.prompt_tokens_details.cached_tokens)
                messages.append(("assistant", answer.choices[0].message.content or ""))

    with process(tiny, "--kv-scheme", IDENTITY, "--prompt-cache-size", "12", "--log-level", "WARNING") as served:
        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client, seed) for seed in range(8)]
            while not all(each.done() for each in clients):
                live = served.report()["live"]
                classes |= set(live["classes"])
                most = max(most, live["sequences"])
                time.sleep(0.05)
            for each in clients:
                each.result()
        after = served.report()
    assert len(asked) == 200
    assert [greedy(tiny, messages) for messages, _ in asked] == [tokens for _, tokens in asked]
    assert {"BatchKVQCache"} <= classes <= {"BatchKVQCache", "KVQCache"}  # the latter of requests that wait
    assert most > 4
    assert sum(count > 100 for count in cached) > 150
    assert after["live"] == {
        "sequences": 0,
        "waiting": 0,
        "tokens": 0,
        "nbytes": 0,
        "fp16_nbytes": 0,
        "classes": {},
    }
    lru = after["lru"]
    assert lru["sequences"] == 12 and set(lru["classes"]) == {"KVQCache"}
    assert lru["nbytes"] == lru["accounted_nbytes"] > 0
    assert after["requests"] == {"failed": 0, "recoveries": 0, "crashes": 0}
    assert lru["failures"] == 0
    assert served.log.count("ERROR") == 0


def test_memory_is_what_the_lru_holds(tiny: Path) -> None:
    """MLX's own count of bytes agrees; without its cache of buffers, whose reuse leaves slack."""
    before = mx.set_cache_limit(0)
    try:
        with in_process(tiny, "tq4", "--prompt-cache-size", "5") as served:
            served.chat(("user", LONG))
            start = served.report()
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda i: served.chat(("system", SYSTEM[i % 3]), ("user", f"{i} " * 40)), range(12)))
            end = served.report()
    finally:
        mx.set_cache_limit(before)
    assert end["lru"]["sequences"] == 5
    grown = end["memory"]["active"] - start["memory"]["active"]
    expected = end["lru"]["nbytes"] - start["lru"]["nbytes"]
    assert abs(grown - expected) < 20_000  # sequences of one batch share statistics


@pytest.mark.parametrize(("scheme", "ratio"), [("tq4", 3.0), ("rvq1", 5.0)])
def test_bytes_per_cached_token(tiny: Path, scheme: str, ratio: float) -> None:
    """Against 16 bits, although this model keeps its few dense tokens in 32."""
    with in_process(tiny, scheme) as served:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda i: served.chat(("user", f"{i} " + LONG[:1900])), range(2)))
        report = served.report()
    lru = report["lru"]
    assert lru["tokens"] > 3600 and lru["fp16_nbytes"] == lru["tokens"] * 3 * 2 * 2 * 64 * 2
    assert lru["fp16_nbytes"] / lru["nbytes"] > ratio
    assert report["scheme"] == scheme and len(report["layers"]["applied"]) == 3 and report["batching"] is True


def test_concurrent_answers_are_those_of_one_at_a_time(tiny: Path) -> None:
    """With a lossy scheme, where prompts share nothing, a batch computes what each request computes alone."""
    prompts = [("user", f"{i * 7919} {sentence(random.Random(i), 30)}") for i in range(8)]
    with in_process(tiny, "tq4") as served, ThreadPoolExecutor(8) as pool:
        together = [ids(answer) for answer in pool.map(lambda prompt: served.chat(prompt), prompts)]
    assert together == [greedy(tiny, [prompt], "tq4") for prompt in prompts]


# ---- requests of every kind ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Iterator[Served]:
    with process(tiny, "--kv-scheme", "tq4", "--log-level", "WARNING") as served:
        yield served


def test_streaming(shared: Served) -> None:
    whole = shared.chat(("user", "Tell me a tale."), max_tokens=30)
    pieces = list(
        shared.client.chat.completions.create(**request([("user", "Tell me a tale.")], max_tokens=30), stream=True)
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_text_completion_and_models(shared: Served) -> None:
    answer = shared.client.completions.create(model="default_model", prompt="Once upon", max_tokens=5)
    assert answer.usage.completion_tokens == 5
    assert len(shared.client.models.list().data) == 1


def test_requests_with_a_seed_are_served_alone(tiny: Path, shared: Served) -> None:
    """The classes of live caches outside of batches."""
    seen: set[str] = set()
    with ThreadPoolExecutor(1) as pool:
        prompt = [("user", "What is a seed? " * 4)]
        answer = pool.submit(shared.chat, *prompt, seed=3, max_tokens=40)
        while not answer.done():
            seen |= set(shared.report()["live"]["classes"])
        assert ids(answer.result()) == greedy(tiny, prompt, "tq4", max_tokens=40)
    assert seen == {"KVQCache"}


def test_client_that_leaves(shared: Served) -> None:
    for _ in range(3):
        stream = shared.client.chat.completions.create(**request([("user", LONG)], max_tokens=1000), stream=True)
        next(iter(stream))
        stream.close()
    assert shared.chat(("user", "Still there?")).usage.completion_tokens > 0
    end = time.monotonic() + 30
    while shared.report()["live"]["sequences"] and time.monotonic() < end:
        time.sleep(0.05)
    assert shared.report()["live"]["sequences"] == 0 and shared.healthy()


def test_overlong_prompt(shared: Served) -> None:
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(shared.chat, ("user", f"{i} hello")) for i in range(3)]
        with pytest.raises(openai.BadRequestError, match=f"context of {CONTEXT} tokens, got 20"):
            shared.chat(("user", "x" * CONTEXT))
        assert all(other.result().usage.completion_tokens for other in others)
    nearly = shared.chat(("user", "x" * (CONTEXT - 60)), max_tokens=1000)
    assert nearly.usage.total_tokens <= CONTEXT and nearly.choices[0].finish_reason in ("length", "stop")
    assert shared.healthy()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},  # no token: mlx-lm's batch generator raises
        {"prompt": "x", "stop": [5]},  # not a string: mlx-lm's loop raises
        {"prompt": {"a": 1}},
        {"prompt": "x", "logit_bias": {"400": 1.0}},  # no such token
        {"prompt": "x", "max_tokens": 0},
    ],
)
def test_wrong_requests(shared: Served, body: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        shared.client.post("/completions", body={"max_tokens": 3, **body}, cast_to=object)
    assert shared.chat(("user", "Fine?"), max_tokens=2).usage.completion_tokens > 0
    assert shared.report()["requests"]["crashes"] == 0


def test_equal_prompt_of_tokens_held(shared: Served) -> None:
    """The text of a prompt with its answer, asked again: mlx-lm's LRU leaves no token to compute."""
    first = shared.client.completions.create(model="default_model", prompt="Repeat after me: ab", max_tokens=8)
    again = shared.client.completions.create(
        model="default_model", prompt="Repeat after me: ab" + first.choices[0].text, max_tokens=4
    )
    assert again.usage.completion_tokens > 0
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_unknown_path_and_model(shared: Served) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        shared.get("/v1/kvqx")
    with pytest.raises(openai.BadRequestError):
        shared.client.chat.completions.create(model="/no/such/folder", messages=[{"role": "user", "content": "x"}])
    assert shared.chat(("user", "Fine?"), max_tokens=2).usage.completion_tokens > 0  # loaded again


# ---- failures inside -----------------------------------------------------------------------------------------------

POISON = "~"  # a prompt with this fails in the model


class PoisonError(RuntimeError):
    """What the model raises."""


@pytest.fixture
def poisoned(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`poisoned(n)` makes the model raise for the poison, or for any sequence of `n` tokens."""
    token = plain(str(tiny))[1].encode(POISON)[0]
    original = llama.Model.__call__

    def arm(longest: int) -> None:
        def call(self: Any, inputs: mx.array, cache: Any = None, **options: Any) -> Any:
            logits = original(self, inputs, cache=cache, **options)  # the caches have changed by now
            if mx.any(inputs == token).item() or mx.any(mx.array(cache[0].offset) >= longest).item():
                raise PoisonError("poisoned")
            return logits

        monkeypatch.setattr(llama.Model, "__call__", call)

    return arm


def mixed(served: Served, bad: tuple[str, str], prompts: list[Any], **options: Any) -> list[list[int]]:
    """Answers to good requests while a bad one is served, which must fail with status 500."""
    with ThreadPoolExecutor(len(prompts) + 1) as pool:
        good = [pool.submit(served.chat, *prompt, **options) for prompt in prompts[:-1]]
        while served.report()["live"]["sequences"] == 0:
            time.sleep(0.01)
        failing = pool.submit(served.chat, bad, max_tokens=60)
        good.append(pool.submit(served.chat, *prompts[-1], **options))
        with pytest.raises(openai.InternalServerError, match="poisoned"):
            failing.result()
        return [ids(each.result()) for each in good]


@pytest.mark.parametrize("scheme", [IDENTITY, "tq4"])
def test_request_that_fails_in_its_prompt(tiny: Path, poisoned: Callable[[int], None], scheme: str) -> None:
    prompts = [[("user", f"{i} {sentence(random.Random(i), 12)}")] for i in range(5)]
    expected = [greedy(tiny, prompt, scheme, 40) for prompt in prompts]
    poisoned(10**6)
    with in_process(tiny, scheme) as served:
        assert mixed(served, ("user", f"bad {POISON}"), prompts, max_tokens=40) == expected
        report = served.report()
        assert served.healthy() and report["requests"]["failed"] == 1 and report["requests"]["crashes"] == 0
        assert report["live"]["nbytes"] == 0 and set(report["lru"]["classes"]) == {"KVQCache"}


def test_request_that_fails_while_generating(tiny: Path, poisoned: Callable[[int], None]) -> None:
    """The whole batch is in the failing call: the others are computed again and go on exactly."""
    prompts = [[("user", f"{i} {sentence(random.Random(i), 12)}")] for i in range(5)]
    expected = [greedy(tiny, prompt, max_tokens=60) for prompt in prompts]
    bad = ("user", "y" * 300)
    assert len(greedy(tiny, [bad], max_tokens=20)) == 20
    poisoned(330)
    with in_process(tiny, IDENTITY) as served:
        assert mixed(served, bad, prompts, max_tokens=60) == expected
        report = served.report()
        assert report["requests"]["failed"] == 1 and report["requests"]["recoveries"] >= 1
        assert served.healthy()


def test_failure_of_a_stream(tiny: Path, poisoned: Callable[[int], None]) -> None:
    poisoned(330)
    with in_process(tiny, "tq4") as served:
        stream = served.client.chat.completions.create(**request([("user", "y" * 300)], max_tokens=60), stream=True)
        with pytest.raises(openai.APIError, match="poisoned"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="poisoned"):  # served alone
            served.chat(("user", POISON), seed=1)
        assert served.chat(("user", "Fine?")).usage.completion_tokens > 0


def test_caches_that_cannot_be_found_filed_or_extracted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise PoisonError("broken")

    prompts = [[("system", SYSTEM[0]), ("user", f"{i}")] for i in range(3)]
    expected = [greedy(tiny, prompt) for prompt in prompts]
    with in_process(tiny, IDENTITY) as served:
        with monkeypatch.context() as patch:
            patch.setattr(served_cache.ServedPromptCache, "_fetch", broken)
            patch.setattr(isolation.BatchGenerator, "extract_cache", broken)
            patch.setattr(served_cache, "_evaluate", broken)
            assert [ids(served.chat(*prompt)) for prompt in prompts] == expected
        assert served.report()["lru"]["failures"] >= 6
        assert [ids(served.chat(*prompt)) for prompt in prompts] == expected


def test_loop_begins_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error where mlx-lm expects none kills its generation thread."""
    with in_process(tiny, "tq4") as served:
        served.chat(("user", "First"))

        def fail(*_: Any) -> None:
            raise PoisonError("unforeseen")

        with monkeypatch.context() as patch:
            patch.setattr(mlx_server.ResponseGenerator, "_log_cache_stats", fail)
            with pytest.raises(openai.InternalServerError, match="unforeseen"):
                served.chat(("user", "Second"))
        assert served.chat(("user", "Third")).usage.completion_tokens > 0
        assert served.report()["requests"]["crashes"] == 1 and served.healthy()


# ---- memory and disk -----------------------------------------------------------------------------------------------


def test_byte_budget(tiny: Path, tmp_path: Path) -> None:
    """Stored caches and requests in flight together; what is evicted is found on the disk."""
    store = PromptStore(tmp_path, 1 << 30)
    most = live = 0
    with in_process(tiny, "tq4", "--prompt-cache-size", "100", "--prompt-cache-bytes", "1MB", store=store) as served:
        prompts = [("user", f"{i} " + LONG[: 300 + i]) for i in range(12)]
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(served.chat, prompt, max_tokens=40) for prompt in prompts]
            while not all(answer.done() for answer in answers):
                report = served.report()
                most = max(most, report["lru"]["nbytes"] + report["live"]["nbytes"])
                live = max(live, report["live"]["sequences"])
        assert all(answer.result() for answer in answers)
        end = served.report()
        assert 0 < end["lru"]["nbytes"] <= 1_000_000
        assert most <= 1_000_000 + 50_000 and live > 1  # some steps of decoding lie between two looks
        assert end["lru"]["sequences"] < 12
        while served.report()["disk"]["waiting_nbytes"]:
            time.sleep(0.01)
        again = served.chat(prompts[0])
        assert again.usage.prompt_tokens_details.cached_tokens > 300
        assert served.report()["disk"]["hits"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_restart(tiny: Path, tmp_path: Path, number: int) -> None:
    """Caches left at the end are found by the next process, and stock tokens come out."""
    argv = ("--kv-scheme", IDENTITY, "--prompt-cache-dir", str(tmp_path), "--prompt-cache-disk-bytes", "50MB")
    first = [("system", SYSTEM[0]), ("user", sentence(random.Random(1), 20))]
    with process(tiny, *argv) as served:
        answer = served.chat(*first)
        assert served.report()["disk"]["entries"] == 0
        assert served.stop(number) == 0
    assert "3 of 3 layers compressed" in served.log
    assert "kvq: 1 of 1 prompt caches are on disk" in served.log
    second = [*first, ("assistant", answer.choices[0].message.content or ""), ("user", "Go on.")]
    with process(tiny, *argv) as served:
        again = served.chat(*second)
        assert again.usage.prompt_tokens_details.cached_tokens > answer.usage.prompt_tokens
        assert ids(again) == greedy(tiny, second)
        report = served.report()
    assert report["disk"]["hits"] == 1 and report["disk"]["corrupt"] == 0


def test_killed_server_leaves_a_good_store(tiny: Path, tmp_path: Path) -> None:
    argv = ("--prompt-cache-dir", str(tmp_path), "--prompt-cache-size", "1")
    with process(tiny, *argv) as served:
        for i in range(3):
            served.chat(("user", f"{i} {LONG[:200]}"))
        deadline = time.monotonic() + 60
        while served.report()["disk"]["entries"] == 0 and time.monotonic() < deadline:
            time.sleep(0.05)  # caches are written by a thread of their own
        served.stop(signal.SIGKILL)
    with process(tiny, *argv) as served:
        answers = [served.chat(("user", f"{i} {LONG[:200]}")) for i in range(3)]
        assert sum(answer.usage.prompt_tokens_details.cached_tokens > 150 for answer in answers) >= 1
        assert served.report()["disk"]["corrupt"] == 0


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--kv-bits", "4"], "choose the bits with --kv-scheme"),
        (["--kv-bits=4"], "choose the bits with --kv-scheme"),
        (["--kv-scheme", "bogus"], "codec name"),
        (["--model", "x"], "must be given once"),
        (["--prompt-cache-disk-bytes", "5GB"], "must go with --prompt-cache-dir"),
        (["--prompt-cache-dir", "d", "--prompt-cache-disk-bytes", "much"], "must be a size"),
    ],
)
def test_refusals(tiny: Path, argv: list[str], fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tiny), *argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("kvq: error: ") and message.count("\n") == 1 and fragment in message


def test_model_that_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        assert main(["serve", str(tmp_path), "--port", str(free_port())]) == 2
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert "kvq: error: the model must load" in capsys.readouterr().err


def test_help_shows_both_kinds_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "--prompt-cache-dir" in text and "--decode-concurrency" in text and "/v1/kvq" in text


def test_names_are_restored(tiny: Path) -> None:
    names = ("BatchGenerator", "ModelProvider", "stream_generate", "run", "scan_cache_dir")
    before = [getattr(mlx_server, name) for name in names] + [mlx_lm.utils.load_model]
    with in_process(tiny, "tq4"):
        assert mlx_server.ModelProvider is not before[1]
    assert [getattr(mlx_server, name) for name in names] + [mlx_lm.utils.load_model] == before


@pytest.mark.parametrize(
    ("facts", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"text_config": {"max_position_embeddings": 1024}}, 1024),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_context_limit(facts: dict[str, Any], limit: int | None) -> None:
    assert context_limit(SimpleNamespace(args=SimpleNamespace(**facts))) == limit


@pytest.mark.real_model
def test_smollm2(tmp_path: Path) -> None:
    """A real model: a few clients at once, then the same conversations on."""
    folder = kvq.demo_model_path("smollm2", progress=False)
    argv = ("--kv-scheme", "tq4", "--prompt-cache-dir", str(tmp_path), "--log-level", "WARNING")
    with process(folder, *argv) as served:
        prompts = [("user", f"What is {i} plus {i + 1}?") for i in range(1, 4)]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda prompt: served.chat(prompt, max_tokens=8), prompts))
        alone = [served.chat(prompt, max_tokens=8, seed=0) for prompt in prompts[:1]]
        report = served.report()
    assert all(answer.choices[0].message.content for answer in answers)
    assert len(alone[0].choices[0].message.content) > 0
    assert set(report["lru"]["classes"]) == {"KVQCache"} and report["requests"]["failed"] == 0


# ---- draft models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [IDENTITY, "tq4"])
def test_draft_model_past_a_window(tmp_path: Path, scheme: str) -> None:
    """Turns of one conversation, drafted: the answers without a draft model, from caches that are found again."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    target = model_folder(tmp_path / "target", sliding_window=160, layer_types=kinds)
    draft = model_folder(tmp_path / "draft", num_hidden_layers=1)
    answers, reused = [], []
    for argv in ((), ("--draft-model", str(draft), "--num-draft-tokens", "4")):
        with in_process(target, scheme, *argv, "--decode-concurrency", "1", "--prompt-concurrency", "1") as served:
            text, found = LONG[:300], []
            for _ in range(3):
                # a seed takes the path of one request at a time, as a draft model does
                answer = served.client.completions.create(
                    model="default_model", prompt=text, max_tokens=24, seed=1, temperature=0, logit_bias={"96": -100}
                )
                found.append(answer.choices[0].text)
                text += found[-1] + " And?"
            report = served.report()["lru"]
            answers.append(found)
            reused.append(report["reused_tokens"])
            assert report["failures"] == 0 and report["classes"].keys() >= {"KVQCache", "SlidingKVQCache"}
    if scheme == IDENTITY:
        assert answers[0] == answers[1]
    assert all(len(text) > 0 for found in answers for text in found)
    assert min(reused) > 600
