"""A hub on the loopback interface: repositories, branches, commits, large files, tokens, and faults on demand.

    with Hub() as hub:
        hub.faults.append(Fault("PUT /_lfs/", status=503))
        subprocess.run(command, env={**os.environ, **hub.environment(home)})

It speaks what huggingface_hub needs of the protocol to create, upload and download models and data sets, with regular
and LFS files. A token names its user; `reader` may only read. It checks the protocol, not the real hub's policies.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKENS = {"token-of-me": "me", "token-of-reader": "reader"}


@dataclass
class Fault:
    """What goes wrong with the next request whose "METHOD /path" begins so: a status, a connection cut, or silence."""

    request: str
    status: int = 503
    cut_after: int | None = None  # bytes of the body
    silent_seconds: float = 0.0  # before the answer


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha to files

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


def blob_id(data: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """The server, its contents and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.faults: list[Fault] = []
        self.requests: list[str] = []

    def __enter__(self) -> Hub:
        bound = type("Bound", (Handler,), {"hub": self})
        self.server = Server(("127.0.0.1", 0), bound)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = "token-of-me") -> dict[str, str]:
        """What a client needs to come here and nowhere else."""
        names = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return {**names, "HF_TOKEN": token or "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0" if token else "1"}

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.branches[branch]]


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed, or gave up waiting


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        length = int(self.headers.get("Content-Length") or 0)
        for fault in self.hub.faults:
            if line.startswith(fault.request):
                self.hub.faults.remove(fault)
                if fault.cut_after is not None:
                    self.rfile.read(min(length, fault.cut_after))
                    self.connection.close()
                    self.close_connection = True
                    return
                self.rfile.read(length)
                time.sleep(fault.silent_seconds)
                return self.answer(fault.status, {"error": "a fault on demand"})
        body = self.rfile.read(length)
        try:
            for pattern, method in ROUTES:
                match = re.fullmatch(pattern, line)
                if match:
                    return method(self, body, *[unquote(group) for group in match.groups() if group is not None])
            raise Refusal(404, f"no such route: {line}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)} if refusal.code else {}
            self.answer(refusal.status, {"error": str(refusal)}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def writable(self, name: str) -> Repo:
        """A repository that the token may write to."""
        if self.user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if self.user != name.split("/")[0]:
            raise Refusal(403, f"Forbidden: you don't have the rights to write to {name}")
        return self.readable(name)

    def readable(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.user != name.split("/")[0]):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def revision(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.readable(name)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # ------------------------------------------------------------ routes

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if self.user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if self.user != name.split("/")[0]:
            raise Refusal(403, f"Forbidden: you don't have the rights to create a model under {name.split('/')[0]}")
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created it", "url": f"{self.hub.address}/{name}"})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repos[name] = Repo(bool(private))
        self.hub.repos[name].add("main", {})
        self.answer(200, {"url": f"{self.hub.address}/{name}", "name": name})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self.writable(name)
        _, files = self.revision(name, revision)
        answers = []
        for entry in json.loads(body)["files"]:
            large = entry["path"].endswith(".safetensors") or entry["size"] > 10_000_000
            known = files.get(entry["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest() if large else blob_id(known)
            mode = "lfs" if large else "regular"
            answers.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def batch(self, body: bytes, name: str) -> None:
        self.writable(name)
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.address}/_lfs/{entry['oid']}"}}
            objects.append({**entry, **({} if entry["oid"] in self.hub.large else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "sha256 mismatch")
        self.hub.large[oid] = body
        self.answer(200, {})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repo = self.writable(name)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self.answer(200, {})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        repo = self.writable(name)
        files = dict(self.revision(name, branch)[1])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repo.add(branch, files)
        url = f"{self.hub.address}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        sha, files = self.revision(name, revision)
        found = {"_id": "0" * 24, "id": name, "modelId": name, "sha": sha, "private": self.hub.repos[name].private}
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.answer(200, {**found, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        _, files = self.revision(name, revision)
        rows = []
        for path, data in sorted(files.items()):
            row = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
            if path.endswith(".safetensors"):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            rows.append(row)
        self.answer(200, rows)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        sha, files = self.revision(name, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data, large = files[path], path.endswith(".safetensors")
        tag = f'"{hashlib.sha256(data).hexdigest() if large else blob_id(data)}"'
        headers = {
            "X-Repo-Commit": sha,
            "ETag": tag,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            begin, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            return self.answer(206, data[begin : end + 1], headers)
        self.answer(200, data, headers)


KIND, NAME = "(?:models|datasets)", r"([^/]+/[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/{KIND}/{NAME}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /_lfs/([0-9a-f]{64})", Handler.store),
    (rf"POST /api/{KIND}/{NAME}/branch/([^/]+)", Handler.branch),
    (rf"POST /api/{KIND}/{NAME}/commit/([^/]+)", Handler.commit),
    (rf"(?:GET|HEAD) /api/{KIND}/{NAME}(?:/revision/([^/]+))?", Handler.info),
    (rf"GET /api/{KIND}/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"(?:GET|HEAD) /(?:datasets/)?{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
