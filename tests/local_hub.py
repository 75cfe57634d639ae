"""A stand-in for the Hugging Face Hub on this machine: takes commits of small files and serves them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories and what was asked of them.

    Attributes:
        address: of the server.
        files: content by repository and file name; a repository without files exists too.
        messages: of the commits.
        tokens: of all requests that came with one.
        refusal: status and words with which commits are refused.
    """

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refusal: tuple[int, str] | None = None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def fail(self, status: int, code: str, words: str) -> None:
            self.answer(status, json.dumps({"error": words}).encode(), x_error_code=code, x_error_message=words)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            hub.tokens.add(self.headers.get("authorization", "").removeprefix("Bearer "))
            _, _, _, owner, name, action, _ = self.path.split("?")[0].split("/")
            repository = f"{owner}/{name}"
            if repository not in hub.files:
                self.fail(404, "RepoNotFound", "Repository not found")
            elif action == "preupload":
                named = [file["path"] for file in json.loads(body)["files"]]
                facts = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in named]
                self.answer(200, json.dumps({"files": facts}).encode(), content_type="application/json")
            elif hub.refusal is not None:
                self.fail(hub.refusal[0], "", hub.refusal[1])
            else:
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "header":
                        hub.messages.append(line["value"]["summary"])
                    else:
                        content = base64.b64decode(line["value"]["content"])
                        hub.files[repository][line["value"]["path"]] = content
                facts = {"commitUrl": f"{hub.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
                self.answer(200, json.dumps(facts).encode(), content_type="application/json")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            name, _, place = self.path.removeprefix("/").partition("/resolve/")
            revision, _, file = place.partition("/")
            repository = hub.files.get(name) if revision in ("main", COMMIT) else None
            if repository is None:
                self.fail(404, "RepoNotFound", "Repository not found")
            elif file not in repository:
                self.fail(404, "EntryNotFound", "Entry not found")
            else:
                content = repository[file]
                tag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(200, content, ETag=tag, x_repo_commit=COMMIT)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def local_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub without repositories that `huggingface_hub` takes for the real one, with an empty cache in `cache`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
