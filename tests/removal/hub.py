"""A stand-in for the Hugging Face Hub: the part of its HTTP API that pushing a model uses, on this machine.

Files of 1 kB or more, and all weights, are uploaded as on the Hub by Git LFS; nothing stands in for Xet's own servers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_token-of-a-test"


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def tags(self) -> list[str]:
        header = re.match(r"---\n(.*?)\n---\n", self.files.get("README.md", b"").decode(), re.DOTALL)
        return [] if header is None else yaml.safe_load(header.group(1)).get("tags", [])


@dataclass
class Hub:
    """What the stand-in holds and has been asked; ``fails`` maps a part of a path to the status it answers with."""

    address: str = ""
    role: str = "write"
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Status and JSON content for a request."""
        self.asked.append(f"{method} {path}")
        for part, status in self.fails.items():
            if part in path:
                return status, {"error": "the stand-in was told to fail"}
        if path.startswith("/upload/"):
            self.uploads[path.removeprefix("/upload/")] = body
            return 200, {}
        if token != TOKEN:
            return 401, {"error": "Invalid credentials in Authorization header"}
        for pattern, reply in ROUTES.items():
            found = re.fullmatch(pattern, f"{method} {path}")
            if found is not None:
                return reply(self, body, *found.groups())
        return 404, {"error": f"no route for {method} {path}"}

    def who(self, _: bytes) -> tuple[int, Any]:
        orgs = [{"name": "the-lab"}]
        return 200, {"name": "Ada", "type": "user", "orgs": orgs, "auth": {"accessToken": {"role": self.role}}}

    def info(self, _: bytes, name: str) -> tuple[int, Any]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        found = self.repositories[name]
        siblings = [{"rfilename": each} for each in found.files]
        return 200, {"id": name, "private": found.private, "tags": found.tags, "siblings": siblings, "sha": "0" * 40}

    def create(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.address}/{name}"}
        if name in self.repositories:
            return 409, address | {"error": "You already created this model repo"}
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repositories[name] = Repository(bool(private), {".gitattributes": b""})
        return 200, address

    def validate(self, body: bytes) -> tuple[int, Any]:
        yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        return 200, {"errors": [], "warnings": []}

    def resolve(self, _: bytes, name: str, path: str) -> tuple[int, Any]:
        files = self.repositories[name].files if name in self.repositories else {}
        return (200, files[path]) if path in files else (404, {"error": "Entry not found"})

    def tree(self, _: bytes, name: str) -> tuple[int, Any]:
        files = self.repositories[name].files
        return 200, [{"type": "file", "path": path, "size": len(files[path]), "oid": "0"} for path in files]

    def preupload(self, body: bytes, name: str) -> tuple[int, Any]:
        files = [
            {
                "path": each["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs" if each["size"] > 1000 or each["path"].endswith(".safetensors") else "regular",
            }
            for each in json.loads(body)["files"]
        ]
        return 200, {"files": files}

    def batch(self, body: bytes, name: str) -> tuple[int, Any]:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.address}/upload/{each['oid']}", "header": {}}}}
            for each in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, body: bytes, name: str) -> tuple[int, Any]:
        repository = self.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.uploads[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repository.files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        oid = f"{repository.commits:040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.address}/{name}/commit/{oid}"}


ID = r"([\w.-]+/[\w.-]+)"
ROUTES: dict[str, Callable[..., tuple[int, Any]]] = {
    r"GET /api/whoami-v2": Hub.who,
    rf"GET /api/models/{ID}": Hub.info,
    rf"GET /api/models/{ID}/tree/main": Hub.tree,
    rf"(?:GET|HEAD) /{ID}/resolve/main/(.+)": Hub.resolve,
    r"POST /api/repos/create": Hub.create,
    r"POST /api/validate-yaml": Hub.validate,
    rf"POST /api/models/{ID}/preupload/main": Hub.preupload,
    rf"POST /{ID}\.git/info/lfs/objects/batch": Hub.batch,
    rf"POST /api/models/{ID}/commit/main": Hub.commit,
}


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub that listens on a port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            status, content = hub.answer(self.command, self.path.partition("?")[0], body, token)
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("ETag", hashlib.sha256(text).hexdigest())
            self.send_header("X-Repo-Commit", "0" * 40)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            elif status >= 400:
                self.send_header("X-Error-Message", content["error"])
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
