"""`kvq serve` and the openai client: a streamed answer, and what the server says of its caches.

    python examples/server_client.py [--model demo:smollm2] [--kv-scheme tq4]

Needs `pip install openai`.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loading import options
from openai import OpenAI


@contextmanager
def served(model: str, scheme: str) -> Iterator[str]:
    """The address of a server that ends with this block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kvq = Path(sys.executable).with_name("kvq")
    with tempfile.TemporaryFile() as log:
        command = [kvq, "serve", model, "--kv-scheme", scheme, "--port", str(port)]
        server = subprocess.Popen(command, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            if not healthy(server, address):
                log.seek(0)
                raise SystemExit(
                    f"the server must start within a minute, its last words: {log.read().decode()[-2000:]}"
                )
            yield address
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def healthy(server: subprocess.Popen[bytes], address: str) -> bool:
    """Whether a server answers before it ends and within a minute."""
    end = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}/health").close()
            return True
        except urllib.error.URLError:
            time.sleep(0.1)
    return False


def main() -> None:
    arguments = options(__doc__).parse_args()
    with served(arguments.model, arguments.kv_scheme) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        chat = [{"role": "user", "content": "Name three rivers."}]
        for part in client.chat.completions.create(model="default_model", messages=chat, max_tokens=40, stream=True):
            print(part.choices[0].delta.content or "", end="", flush=True)
        with urllib.request.urlopen(f"{address}/v1/kvq") as answer:
            report = json.load(answer)
    del report["layers"]  # one entry for each
    print("\n\n" + json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
