"""`kvq serve` against mlx-lm's own server: the same 200 requests of 8 clients, in alternating blocks.

Every client leads conversations that begin with one long system prompt; each turn is a request. Measured over HTTP:
errors, generated tokens a second, and what the servers hold at the end. The weights are float32 (half precision is slow
on CPUs), so mlx-lm's own caches are float32 too; ratios are given against 16 bits as well.

    python benchmarks/serve.py [--model smollm2] [--blocks 5] [--scheme tq4]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
from mlx.utils import tree_flatten

import mlx_kvq_plugin as kvq

CLIENTS, TURNS = 8, 5
TOPICS = ("the sea", "a long winter", "old maps", "bread", "the moon", "a lost key", "two brothers", "the first train")


def float32_folder(name: str, folder: Path) -> Path:
    """A copy of a demo model with float32 weights, which mlx-lm's server loads as they are."""
    model, _ = common.load(name)
    source = kvq.demo_model_path(name)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return folder


class Server:
    """A server process."""

    def __init__(self, name: str, command: list[str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        options = ["--port", str(port), "--log-level", "ERROR", "--prompt-cache-size", str(CLIENTS)]
        self.process = subprocess.Popen(command + options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while self.process.poll() is None:
            try:
                self.call("/health")
                return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"{name} did not start")

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)


class Run:
    """What came out of one server."""

    def __init__(self) -> None:
        self.requests = self.errors = self.tokens = self.cached = self.prompt = 0
        self.seconds = 0.0
        self.lock = threading.Lock()

    def block(self, server: Server, system: str, seed: int, max_tokens: int) -> None:
        """One conversation of every client."""
        start = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda i: self.talk(server, system, 100 * seed + i, max_tokens), range(CLIENTS)))
        self.seconds += time.perf_counter() - start

    def talk(self, server: Server, system: str, seed: int, max_tokens: int) -> None:
        rng = random.Random(seed)
        messages = [{"role": "system", "content": system}]
        for _ in range(TURNS):
            messages.append({"role": "user", "content": f"Write one sentence about {rng.choice(TOPICS)} ({seed})."})
            try:
                answer = server.call("/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens})
                text, usage = answer["choices"][0]["message"]["content"] or "", answer["usage"]
            except (OSError, urllib.error.HTTPError) as error:
                print(server.name, error)
                text, usage = "", None
            with self.lock:
                self.requests += 1
                self.errors += usage is None
                if usage:
                    self.tokens += usage["completion_tokens"]
                    self.prompt += usage["prompt_tokens"]
                    self.cached += usage["prompt_tokens_details"]["cached_tokens"]
            messages.append({"role": "assistant", "content": text})


def main() -> None:
    parser = argparse.ArgumentParser(description="kvq serve against mlx-lm's server.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--scheme", default="tq4")
    parser.add_argument("--blocks", type=int, default=5, help=f"of {CLIENTS * TURNS} requests for each server")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--system-characters", type=int, default=3600)
    options = parser.parse_args()
    system = "Answer in one short sentence. The rest is background.\n" + common.documentation()
    system = system[: options.system_characters]
    with tempfile.TemporaryDirectory() as scratch:
        folder = float32_folder(options.model, Path(scratch) / "model")
        kvq_command = [str(Path(sys.executable).with_name("kvq")), "serve", str(folder)]
        stock = [str(Path(sys.executable).with_name("mlx_lm.server")), "--model", str(folder)]
        servers = [
            Server("mlx_lm.server", [sys.executable, *stock]),
            Server(f"kvq serve {options.scheme}", [sys.executable, *kvq_command, "--kv-scheme", options.scheme]),
        ]
        runs = [Run() for _ in servers]
        try:
            for server in servers:  # both begin with the system prompt in memory
                Run().talk(server, system, 999, 1)
            for block in range(options.blocks):
                for i in (0, 1) if block % 2 == 0 else (1, 0):
                    runs[i].block(servers[i], system, block, options.max_tokens)
                    print(f"block {block} {servers[i].name}: {runs[i].seconds:.1f} s so far", flush=True)
            report = servers[1].call("/v1/kvq")
        finally:
            for server in servers:
                server.process.terminate()
            for server in servers:
                server.process.wait(60)
    lru = report["lru"]
    rows: list[dict[str, Any]] = []
    for server, run in zip(servers, runs, strict=True):
        rows.append(
            {
                "server": server.name,
                "model": options.model,
                "requests": run.requests,
                "errors": run.errors,
                "generated tokens/s": run.tokens / run.seconds,
                "requests/s": run.requests / run.seconds,
                "cached share of prompts": run.cached / run.prompt,
            }
        )
    per_token = lru["nbytes"] / lru["tokens"]
    fp16 = lru["fp16_nbytes"] / lru["tokens"]
    rows[0] |= {"bytes per cached token": 2 * fp16, "of 16 bits": 2.0}
    rows[1] |= {"bytes per cached token": per_token, "of 16 bits": per_token / fp16}
    rows[1] |= {"speed against mlx_lm.server": rows[1]["generated tokens/s"] / rows[0]["generated tokens/s"]}
    rows[1] |= {"cache classes": lru["classes"], "tokens cached": lru["tokens"], "sequences cached": lru["sequences"]}
    head = [name for name in rows[0] if name != "model"]
    common.print_table(head, [[row[name] for name in head] for row in rows])
    print(f"speed against mlx_lm.server: {rows[1]['speed against mlx_lm.server']:.2f}")
    common.store("serve", rows)


if __name__ == "__main__":
    main()
