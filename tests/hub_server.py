"""A stand-in for the model hub: as much of its HTTP API as the real client needs to create, look at and fill a
repository. It stores what arrives, so that tests can compare bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_valid"
_LFS = (".pte", ".onnx", ".data")


@dataclass
class Repo:
    """One repository: its branches, each a list of commits, each all files by name."""

    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{".gitattributes": b"\n"}]})
    messages: list[str] = field(default_factory=list)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.branches[branch][-1]

    def sha(self, branch: str) -> str:
        """A commit id; the stand-in knows only the newest of each branch."""
        return hashlib.sha1(f"{branch} {len(self.branches[branch])}".encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        return next((name for name in self.branches if revision in (name, self.sha(name))), None)


class Hub:
    """State of the stand-in.

    Attributes:
        fail: (method, part of the path) -> status to answer instead.
        user, orgs, role: what whoami says; role None: nothing about the token.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.fail: dict[tuple[str, str], int] = {}
        self.requests: list[tuple[str, str]] = []
        self.user, self.orgs = "ada", ["team"]
        self.role: str | None = "write"
        self.endpoint = ""

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        self.repos[repo_id] = Repo(private)
        self.repos[repo_id].files().update(files)
        return self.repos[repo_id]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Runs the stand-in on a free port until the block ends."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((method, path))
        for (wanted, part), status in self.hub.fail.items():
            if wanted == method and part in path:
                return self._send(status, {"error": "as the test wants"})
        if not path.startswith("/lfs-objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"})
        for wanted, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted == method and match:
                return action(self, body, *match.groups())
        return self._send(404, {"error": f"the stand-in does not know {method} {path}"})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._send(404, {"error": code}, {"X-Error-Code": code})

    def whoami(self, body: bytes) -> None:
        hub = self.hub
        auth = {"accessToken": hub.role and {"displayName": "mine", "role": hub.role}}
        self._send(200, {"name": hub.user, "type": "user", "orgs": [{"name": name} for name in hub.orgs], "auth": auth})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return self._send(400, {"errors": [{"message": "no metadata"}]})
        return self._send(200, {"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or self.hub.user}/{asked['name']}"
        if repo_id in self.hub.repos:
            return self._send(409, {"error": "exists", "url": f"{self.hub.endpoint}/{repo_id}"})
        self.hub.repos[repo_id] = Repo(asked.get("visibility") == "private")
        return self._send(200, {"url": f"{self.hub.endpoint}/{repo_id}"})

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        branches = self.hub.repos[repo_id].branches
        if name in branches:
            return self._send(409, {"error": "exists"})
        branches[name] = [dict(branches["main"][-1])]
        return self._send(200, {})

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self._missing("RepoNotFound")
        branch = repo.find(revision)
        if branch is None:
            return self._missing("RevisionNotFound")
        siblings = [{"rfilename": name} for name in repo.files(branch)]
        about = {"id": repo_id, "modelId": repo_id, "sha": repo.sha(branch), "private": repo.private}
        return self._send(200, {**about, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        repo = self.hub.repos[repo_id]
        branch = repo.find(revision)
        assert branch is not None
        data = repo.files(branch)[name]
        etag = hashlib.sha1(data).hexdigest()
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": repo.sha(branch)})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self._send(
            200,
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(_LFS) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            },
        )

    def batch(self, body: bytes, repo_id: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs-objects/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "wrong bytes"})
        self.hub.objects[oid] = body
        return self._send(200, {})

    def commit(self, body: bytes, repo_id: str, branch: str) -> None:
        repo = self.hub.repos[repo_id]
        files = dict(repo.files(branch))
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repo.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self._send(400, {"error": item["key"]})
        repo.branches[branch].append(files)
        sha = repo.sha(branch)
        return self._send(200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha})


_REPO = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/(.+)", _Handler.info),
    ("HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs-objects/([0-9a-f]+)", _Handler.put),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
]
