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
from typing import Any

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
        large: files of at least so many bytes are uploaded as LFS objects.
        objects: LFS objects by digest.
        cut: bytes that are sent of a file before the connection ends, by its name.
        private: names of repositories that were made private.
        password: a token that requests must come with; empty for none.
    """

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refusal: tuple[int, str] | None = None
    large: int = 2**62
    objects: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    password: str = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"content_length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def fail(self, status: int, code: str, words: str) -> None:
            self.answer(status, json.dumps({"error": words}).encode(), x_error_code=code, x_error_message=words)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            hub.tokens.add(self.headers.get("authorization", "").removeprefix("Bearer "))
            if self.unauthorized():
                return
            if self.path == "/api/validate-yaml":
                self.answer(200, b'{"errors": [], "warnings": []}', content_type="application/json")
                return
            if self.path == "/api/repos/create":
                self.create(json.loads(body))
                return
            if self.path.endswith("/info/lfs/objects/batch"):
                self.batch(json.loads(body))
                return
            _, _, _, owner, name, action, _ = self.path.split("?")[0].split("/")
            repository = f"{owner}/{name}"
            if repository not in hub.files:
                self.fail(404, "RepoNotFound", "Repository not found")
            elif action == "preupload":
                facts = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["size"] >= hub.large else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(body)["files"]
                ]
                self.answer(200, json.dumps({"files": facts}).encode(), content_type="application/json")
            elif hub.refusal is not None:
                self.fail(hub.refusal[0], "", hub.refusal[1])
            else:
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "header":
                        hub.messages.append(line["value"]["summary"])
                    elif line["key"] == "lfsFile":
                        hub.files[repository][line["value"]["path"]] = hub.objects[line["value"]["oid"]]
                    else:
                        content = base64.b64decode(line["value"]["content"])
                        hub.files[repository][line["value"]["path"]] = content
                facts = {"commitUrl": f"{hub.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
                if "create_pr=1" in self.path:
                    facts["pullRequestUrl"] = f"{hub.address}/{repository}/discussions/1"
                self.answer(200, json.dumps(facts).encode(), content_type="application/json")

        def unauthorized(self) -> bool:
            given = self.headers.get("authorization", "").removeprefix("Bearer ")
            if hub.password and given != hub.password:
                self.fail(401, "", "Invalid username or password.")
                return True
            return False

        def create(self, facts: dict[str, object]) -> None:
            repository = f"{facts['organization']}/{facts['name']}"
            hub.files[repository] = {}
            if facts.get("private") or facts.get("visibility") == "private":
                hub.private.add(repository)
            self.answer(
                200, json.dumps({"url": f"{hub.address}/{repository}"}).encode(), content_type="application/json"
            )

        def batch(self, facts: dict[str, Any]) -> None:
            objects = [
                {**own, "actions": {"upload": {"href": f"{hub.address}/lfs/{own['oid']}"}}} for own in facts["objects"]
            ]
            answer = json.dumps({"transfer": "basic", "objects": objects}).encode()
            self.answer(200, answer, content_type="application/vnd.git-lfs+json")

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            digest = self.path.rpartition("/")[2]
            assert hashlib.sha256(content).hexdigest() == digest
            hub.objects[digest] = content
            self.answer(200, b"")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.unauthorized():
                return
            if self.path.startswith("/api/models/"):
                name = self.path.removeprefix("/api/models/").split("?")[0]
                if name in hub.files:
                    self.answer(200, json.dumps({"id": name}).encode(), content_type="application/json")
                else:
                    self.fail(404, "RepoNotFound", "Repository not found")
                return
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
                if file in hub.cut and self.command == "GET":
                    size = str(len(content))
                    self.answer(200, content[: hub.cut[file]], content_length=size, ETag=tag, x_repo_commit=COMMIT)
                    self.close_connection = True
                else:
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
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go by LFS
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
