"""A minimal Hugging Face Hub for tests: in-memory repositories behind the routes that the Hub's clients use.

Files are uploaded inside the commits (`uploadMode: regular`), so neither LFS nor Xet is needed. Set `HF_ENDPOINT` to
the server's URL to point a client at it.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


class HubServer(ThreadingHTTPServer):
    """Serves until `shutdown`; use as a context manager.

    Attributes:
        endpoint: the URL for HF_ENDPOINT.
        repositories: {(type, name): {"private": bool, "refs": {name: commit}, "commits": {commit: {path: bytes}}}}.
        broken_commits: number of next commits that fail: the connection is closed without an answer.
        requests: "METHOD path" of all requests, in order.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories, self.requests, self.broken_commits = {}, [], 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.shutdown()
        super().__exit__(*exception)

    def handle_error(self, request, client_address):
        """Ignore errors in the handler, such as a client that closes the connection."""

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Return the files of a repository at a branch, tag or commit; raise KeyError if it does not exist."""
        repository = self.repositories[kind, name]
        return repository["commits"][repository["refs"].get(revision, revision)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._route()

    def do_HEAD(self):
        self._route()

    def do_POST(self):
        self._route()

    def _route(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} /{path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = path.split("/")
        if parts == ["api", "validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        kind = "model"
        if parts[0] == "api":
            kind, parts = parts[1].removesuffix("s"), parts[2:]
        elif parts[0] == "datasets":
            kind, parts = "dataset", parts[1:]
        name, action, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision", parts[3:]
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if action == "refs":
            refs = [{"name": ref, "ref": ref, "targetCommit": sha} for ref, sha in repository["refs"].items()]
            return self._answer(200, {"branches": refs[:1], "tags": refs[1:], "converts": []})
        revision = rest[0] if rest else "main"
        commit = repository["refs"].get(revision, revision)
        if commit not in repository["commits"]:
            return self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        files = repository["commits"][commit]
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._answer(
                200, {"id": name, "sha": commit, "siblings": siblings, "tags": [], **_privacy(repository)}
            )
        if action == "tree":
            inside = "/".join(rest[1:])
            return self._answer(200, [e for e in _tree(files) if e["path"].startswith(inside)])
        if action == "paths-info":
            wanted = json.loads(body)["paths"]
            return self._answer(200, [entry for entry in _tree(files) if entry["path"] in wanted])
        if action == "tag":
            repository["refs"][json.loads(body)["tag"]] = commit
            return self._answer(200, {})
        if action == "preupload":
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer(200, {"files": [{"path": f["path"], **modes} for f in json.loads(body)["files"]]})
        if action == "commit":
            return self._commit(name, repository, revision, files, body)
        if action == "resolve":
            return self._file(files, "/".join(rest[1:]), commit)
        return self._answer(404, {"error": f"no route {self.path}"})

    def _create(self, request):
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        key = request.get("type") or "model", name
        status = 409 if key in self.server.repositories else 200
        private = request.get("visibility") == "private"
        first = {"private": private, "refs": {"main": "0" * 40}, "commits": {"0" * 40: {}}}
        self.server.repositories.setdefault(key, first)
        self._answer(status, {"url": f"{self.server.endpoint}/{'datasets/' * (key[0] == 'dataset')}{name}"})

    def _commit(self, name, repository, revision, files, body):
        if self.server.broken_commits:
            self.server.broken_commits -= 1
            self.close_connection = True
            return self.connection.shutdown(2)
        files = dict(files)
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] == "deletedFile":
                files.pop(operation["value"]["path"], None)
        commit = hashlib.sha1(repr(sorted(files.items())).encode() + repository["refs"][revision].encode()).hexdigest()
        repository["commits"][commit] = files
        repository["refs"][revision] = commit
        url = f"{self.server.endpoint}/{name}/commit/{commit}"
        return self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _file(self, files, path, commit):
        if path not in files:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, status, headers = files[path], 200, {"ETag": f'"{_oid(files[path])}"', "X-Repo-Commit": commit}
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            last = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : last + 1], 206
        return self._answer(status, content, headers)

    def _answer(self, status, content, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(content),
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _privacy(repository):
    return {"private": repository["private"], "gated": False, "disabled": False, "downloads": 0, "likes": 0}


def _oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(files):
    return [{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()]
