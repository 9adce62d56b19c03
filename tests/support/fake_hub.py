"""A Hub of models in memory, for tests without network: what `create_repo`, `upload_folder` and downloads of small files ask for.

Routes that it does not know answer 404 and stay in `log`, so a test that needs one more says which.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

USER = "tester"


class FakeHub:
    """Repositories by name, each a dict of files by path.

    Attributes:
        url: the server's address while it runs.
        log: (method, path) of every request.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.log: list[tuple[str, str]] = []
        self.url = ""

    @contextmanager
    def running(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def create(self, request: dict) -> tuple[int, dict]:
        name = f"{request.get('organization') or USER}/{request['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, {})
        return status, {"id": name, "name": name, "url": f"{self.url}/{name}"}

    def info(self, name: str) -> dict:
        files = self.repositories[name]
        return {"id": name, "modelId": name, "sha": _commit(files), "private": False, "tags": [], "siblings": [{"rfilename": path} for path in sorted(files)]}

    def tree(self, name: str, paths: list[str] | None = None) -> list[dict]:
        files = self.repositories[name]
        chosen = sorted(files) if paths is None else [path for path in paths if path in files]
        return [{"type": "file", "path": path, "size": len(files[path]), "oid": _sha(files[path])} for path in chosen]

    def commit(self, name: str, lines: list[dict]) -> dict:
        files = self.repositories[name]
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                files.pop(line["value"]["path"], None)
        return {"commitUrl": f"{self.url}/{name}/commit/{_commit(files)}", "commitOid": _commit(files)}


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _commit(files: dict[str, bytes]) -> str:
    return _sha(json.dumps({path: _sha(content) for path, content in sorted(files.items())}).encode())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, body = unquote(urlparse(self.path).path), self._body()
        self.hub.log.append((self.command, path))
        if path == "/api/whoami-v2":
            self._json(200, {"name": USER, "type": "user", "orgs": [], "auth": {}})
        elif path == "/api/validate-yaml":
            self._json(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._json(*self.hub.create(json.loads(body)))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([^/]+)(?:/.*)?)?", path):
            self._api(*match.groups(), body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(*match.groups())
        else:
            self._error(404, "", f"no route {path}")

    do_HEAD = do_POST = do_GET

    def _api(self, name: str, operation: str | None, body: bytes):
        if name not in self.hub.repositories:
            self._error(404, "RepoNotFound", f"no repository {name}")
        elif operation in (None, "revision"):
            self._json(200, self.hub.info(name))
        elif operation == "tree":
            self._json(200, self.hub.tree(name))
        elif operation == "paths-info":
            self._json(200, self.hub.tree(name, json.loads(body)["paths"]))
        elif operation == "preupload":
            self._json(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]})
        elif operation == "commit":
            self._json(200, self.hub.commit(name, [json.loads(line) for line in body.splitlines() if line.strip()]))
        else:
            self._error(404, "", f"no operation {operation}")

    def _file(self, name: str, path: str):
        files = self.hub.repositories.get(name)
        if files is None:
            self._error(404, "RepoNotFound", f"no repository {name}")
        elif path not in files:
            self._error(404, "EntryNotFound", f"no file {path}")
        else:
            self._send(200, files[path], "application/octet-stream", {"X-Repo-Commit": _commit(files), "ETag": f'"{_sha(files[path])}"'})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, status: int, value):
        self._send(status, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str, message: str):
        self._send(status, json.dumps({"error": message}).encode(), "application/json", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]):
        self.send_response(status)
        for key, value in {**headers, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
