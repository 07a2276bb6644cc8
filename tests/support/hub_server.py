"""A small Hub on the loopback: enough of its commit, LFS and download endpoints for ``huggingface_hub`` and ``datasets``.

Written against huggingface_hub 2.4 without Xet (``HF_HUB_DISABLE_XET=1``). Objects lie in a folder, commits in memory. It
counts what is uploaded, keeps a log of requests, checks tokens, and can fail on demand::

    with HubServer(folder) as server:
        HfApi(endpoint=server.url, token=server.token).create_repo("user/name", repo_type="dataset")

    python tests/hub_server.py FOLDER     # prints its URL, serves until killed; the token is "hf_good"
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, USER = "hf_good", "user"
PAGE = 20
#: As the Hub writes it into a new repository of a data set, shortened.
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.bin", "*.safetensors", "*.parquet")
)
#: Identifiers of licences that occur here; the Hub knows more.
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-2.0", "cc-by-nc-4.0", "cc0-1.0", "other", "unknown"}


@dataclass(frozen=True)
class Blob:
    """A file of a commit: ``key`` is its name among the objects, the SHA-256 for LFS, else git's SHA-1."""

    key: str
    size: int
    lfs: bool


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add_commit(self, branch: str, files: dict[str, Blob], title: str) -> str:
        text = json.dumps(
            [self.kind, self.name, title, len(self.commits), sorted((p, b.key) for p, b in files.items())]
        )
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.refs[branch] = files, title, sha
        return sha


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, body: Any = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.body = {"error": message} if body is None else body


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The server, its state and its faults.

    Attributes:
        uploads: Path of an LFS object's first commit, or its SHA-256 until there is one -> completed uploads of its bytes.
        requests: (method, path) of all requests.
        fail_after: After so many completed uploads every further one is refused, status 403. ``None`` never fails.
        hang_after: The same, but further uploads are not answered before ``release`` is set.
        multipart: LFS objects larger than this are uploaded in parts of this size, bytes.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = Path(folder)
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: Counter[str] = Counter()
        self.downloads: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.fail_after: int | None = None
        self.hang_after: int | None = None
        self.multipart = 1 << 40
        self.token = TOKEN
        self.lock = threading.RLock()
        self.release = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    # ---- What tests look at and do ----

    @property
    def num_uploads(self) -> int:
        return sum(self.uploads.values())

    def repo(self, name: str, kind: str = "dataset") -> Repo:
        return self.repos[kind, name]

    def files(self, name: str, kind: str = "dataset", revision: str = "main") -> dict[str, Blob]:
        repo = self.repo(name, kind)
        return repo.commits[repo.refs.get(revision, revision)]

    def read(self, name: str, path: str, kind: str = "dataset") -> bytes:
        return self.object(self.files(name, kind)[path].key).read_bytes()

    def alter(self, name: str, path: str, bit: int, kind: str = "dataset") -> None:
        """Flip a bit of a stored object, behind the back of its hash."""
        where = self.object(self.files(name, kind)[path].key)
        content = bytearray(where.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        where.write_bytes(content)

    def replace(self, name: str, path: str, content: bytes | None, kind: str = "dataset") -> None:
        """Commit other content of a file, as anybody with write access can; ``None`` deletes it."""
        files = dict(self.files(name, kind))
        lfs = files.pop(path).lfs
        if content is not None:
            key = hashlib.sha256(content).hexdigest() if lfs else git_hash(content)
            self.object(key).write_bytes(content)
            files[path] = Blob(key, len(content), lfs)
        self.repo(name, kind).add_commit("main", files, "altered")

    def publish(self, name: str, folder: Path, kind: str = "model") -> None:
        """Put a folder where somebody else would have put it: into a public repository under any name."""
        files = {}
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            lfs = path.suffix in (".safetensors", ".parquet")
            key = hashlib.sha256(content).hexdigest() if lfs else git_hash(content)
            self.object(key).write_bytes(content)
            files[path.relative_to(folder).as_posix()] = Blob(key, len(content), lfs)
        repo = self.repos[kind, name] = Repo(kind, name, private=False)
        repo.add_commit("main", files, "as published")

    def object(self, key: str) -> Path:
        return self.folder / "objects" / key


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one packet: else each answer waits for the client's delayed acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *unused: Any) -> None:
        pass

    # ---- Plumbing ----

    def _dispatch(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = split.path, {name: values[0] for name, values in parse_qs(split.query).items()}
        self.hub.requests.append((self.command, self.path))
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            self.body = b"".join(iter(self._read_chunk, b""))
        else:
            self.body = self.rfile.read(length)
        try:
            self.user = self._authenticate()
            for method, pattern, name in ROUTES:
                found = re.fullmatch(pattern, self.route)
                if found is not None and self.command in method.split("|"):
                    arguments = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                    getattr(self, name)(**arguments)
                    return
            raise Refused(404, f"no endpoint {self.command} {self.route}")
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code is not None:
                headers["X-Error-Code"] = refusal.code
            self._answer(refusal.body, refusal.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def _read_chunk(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0], 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _answer(self, body: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _authenticate(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if header != f"Bearer {self.hub.token}":
            raise Refused(401, "Invalid credentials in Authorization header")
        return USER

    def _repo(self, kind: str, name: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind.removesuffix("s"), name))
        if repo is None or (repo.private and self.user is None):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user is None:
            raise Refused(401, "Invalid username or password.")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # ---- Repositories ----

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        self._answer({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        wanted = json.loads(self.body)
        kind = wanted.get("type") or "model"
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if name.split("/")[0] != USER:
            raise Refused(403, f"You don't have the rights to create a {kind} under the namespace {name.split('/')[0]}")
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.repos:
                raise Refused(
                    409, "You already created this repo", body={"url": url, "error": "You already created this"}
                )
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            repo = self.hub.repos[kind, name] = Repo(kind, name, private)
            content = GITATTRIBUTES.encode()
            blob = Blob(git_hash(content), len(content), False)
            self.hub.object(blob.key).write_bytes(content)
            repo.add_commit("main", {".gitattributes": blob}, "initial commit")
        self._answer({"url": url, "name": name, "private": private, "id": "1"})

    def validate(self) -> None:
        wanted = json.loads(self.body)
        errors = []
        found = re.match(r"---\n(.*?)\n---\n", wanted["content"], re.DOTALL)
        try:
            data = yaml.safe_load(found[1]) if found else {}
            if not isinstance(data, dict):
                raise ValueError("not a mapping")
            licenses = data.get("license", [])
            for name in [licenses] if isinstance(licenses, str) else licenses:
                if name not in LICENSES:
                    errors.append(f'"license" must be one of {sorted(LICENSES)}')
            for config in data.get("configs", []):
                if not {"config_name", "data_files"} <= config.keys():
                    errors.append('"configs" must have config_name and data_files')
            errors += [f'"{name}" must not be empty' for name, value in data.items() if value in (None, "")]
        except (yaml.YAMLError, ValueError) as error:
            errors.append(f"invalid YAML: {error}")
        body = {"errors": [{"message": message} for message in errors], "warnings": []}
        self._answer(body, 400 if errors else 200)

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self._repo(kind, name)
        sha = self._commit(repo, revision)
        self._answer(
            {
                "_id": "1",
                "id": name,
                "sha": sha,
                "author": USER,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in repo.commits[sha]],
                "createdAt": "2026-01-01T00:00:00.000Z",
                "lastModified": "2026-01-01T00:00:00.000Z",
            }
        )

    def refs(self, kind: str, name: str) -> None:
        refs = self._repo(kind, name).refs.items()
        branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": sha} for b, sha in refs]
        self._answer({"branches": branches, "converts": [], "tags": []})

    def branch(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name, write=True)
        if revision in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[revision] = repo.refs["main"]
        self._answer({})

    # ---- Listing ----

    def _entry(self, path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": git_hash(blob.key.encode())}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.key, "size": blob.size, "pointerSize": 130}
        if self.query.get("expand", "").lower() == "true" or b"expand=true" in self.body.lower():
            entry["lastCommit"] = {"id": "0" * 40, "title": "commit", "date": "2026-01-01T00:00:00.000Z"}
        return entry

    def _listing(self, files: dict[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
        below = {p: b for p, b in files.items() if not folder or p.startswith(folder + "/")}
        if folder and not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        entries, depth = {}, folder.count("/") + 1 if folder else 0
        for path, blob in sorted(below.items()):
            parts = path.split("/")
            for end in range(depth + 1, len(parts) if recursive else min(depth + 2, len(parts))):
                parent = "/".join(parts[:end])
                entries[parent] = {"type": "directory", "path": parent, "oid": git_hash(parent.encode()), "size": 0}
            if recursive or len(parts) == depth + 1:
                entries[path] = self._entry(path, blob)
        return list(entries.values())

    def tree(self, kind: str, name: str, revision: str, path: str = "") -> None:
        repo = self._repo(kind, name)
        files = repo.commits[self._commit(repo, revision)]
        entries = self._listing(files, path.strip("/"), self.query.get("recursive", "").lower() == "true")
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + PAGE < len(entries):
            query = "&".join(f"{n}={v}" for n, v in {**self.query, "cursor": start + PAGE}.items())
            headers["Link"] = f'<{self.hub.url}{self.route}?{query}>; rel="next"'
        self._answer(entries[start : start + PAGE], headers=headers)

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name)
        files = repo.commits[self._commit(repo, revision)]
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        entries = []
        for path in paths:
            if path in files:
                entries.append(self._entry(path, files[path]))
            elif any(other.startswith(path.rstrip("/") + "/") for other in files):
                entries.append({"type": "directory", "path": path, "oid": git_hash(path.encode()), "size": 0})
        self._answer(entries)

    # ---- Uploading ----

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name, write=True)
        files = repo.commits[self._commit(repo, revision)]
        attributes = files.get(".gitattributes")
        text = "" if attributes is None else self.hub.object(attributes.key).read_text(errors="replace")
        patterns = [line.split()[0] for line in text.splitlines() if "filter=lfs" in line]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            lfs = file["size"] > 10 * 2**20 or any(
                fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in patterns
            )
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in files:
                answer["oid"] = files[path].key
            answers.append(answer)
        self._answer({"files": answers})

    def lfs_batch(self, name: str, kind: str = "models") -> None:
        self._repo(kind, name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not self.hub.object(oid).exists():
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
                if size > self.hub.multipart:
                    parts = range(1, -(-size // self.hub.multipart) + 1)
                    upload = {"href": f"{self.hub.url}/lfs/{oid}/complete"}
                    upload["header"] = {str(part): f"{self.hub.url}/lfs/{oid}/{part}" for part in parts}
                    upload["header"]["chunk_size"] = str(self.hub.multipart)
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects})

    def _fault(self) -> None:
        hub = self.hub
        if hub.hang_after is not None and hub.num_uploads >= hub.hang_after:
            hub.release.wait()
        if hub.fail_after is not None and hub.num_uploads >= hub.fail_after:
            raise Refused(403, "Private repository storage limit reached")

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "content does not match its oid")
        temporary = self.hub.object(f"{oid}.{threading.get_ident()}")
        temporary.write_bytes(content)
        temporary.replace(self.hub.object(oid))
        self.hub.uploads[oid] += 1

    def lfs_put(self, oid: str) -> None:
        with self.hub.lock:
            self._fault()
            self._store(oid, self.body)
        self._answer({})

    def lfs_part(self, oid: str, part: str) -> None:
        self.hub.object(f"{oid}.part{int(part):05d}").write_bytes(self.body)
        self._answer({}, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        parts = sorted(self.hub.object(oid).parent.glob(f"{oid}.part*"))
        with self.hub.lock:
            self._fault()
            self._store(oid, b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink()
        self._answer({})

    def lfs_verify(self, oid: str) -> None:
        if not self.hub.object(oid).exists():
            raise Refused(404, "no such object")
        self._answer({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name, write=True)
        with self.hub.lock:
            files, title = dict(repo.commits[self._commit(repo, revision)]), ""
            for line in self.body.splitlines():
                item = json.loads(line)
                value = item["value"]
                path = value.get("path", "")
                if item["key"] == "header":
                    title = value["summary"]
                elif item["key"] == "file":
                    content = base64.b64decode(value["content"])
                    blob = Blob(git_hash(content), len(content), False)
                    self.hub.object(blob.key).write_bytes(content)
                    files[path] = blob
                elif item["key"] == "lfsFile":
                    stored = self.hub.object(value["oid"])
                    if not stored.exists():
                        raise Refused(400, f"LFS pointer of {path} points to no object")
                    files[path] = Blob(value["oid"], stored.stat().st_size, True)
                    self.hub.uploads[path] += self.hub.uploads.pop(value["oid"], 0)
                elif item["key"] == "deletedFile":
                    if files.pop(path, None) is None:
                        raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                else:
                    raise Refused(400, f"unknown operation {item['key']}")
            sha = repo.add_commit(revision, files, title)
        url = f"{self.hub.url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{name}/commit/{sha}"
        self._answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # ---- Downloading ----

    def resolve(self, name: str, revision: str, path: str, kind: str = "models") -> None:
        repo = self._repo(kind, name)
        sha = self._commit(repo, revision)
        blob = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            self._answer(
                {"error": "Entry not found"},
                404,
                {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
            )
            return
        content = self.hub.object(blob.key).read_bytes()
        headers |= {"ETag": f'"{blob.key}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.key}"', "X-Linked-Size": str(blob.size)}
        if self.command == "GET":
            self.hub.downloads[path] += 1
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            self._answer(content, headers=headers)
            return
        start = int(found[1]) if found[1] else len(content) - int(found[2])
        stop = min(int(found[2]) + 1, len(content)) if found[1] and found[2] else len(content)
        if start >= len(content):
            raise Refused(416, "Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._answer(content[start:stop], 206, headers)


_REPO = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}"
_PREFIX = r"/(?:(?P<kind>datasets|spaces)/)?"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", _API, "info"),
    ("GET", _API + r"/revision/(?P<revision>[^/]+)", "info"),
    ("GET", _API + r"/refs", "refs"),
    ("POST", _API + r"/branch/(?P<revision>[^/]+)", "branch"),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?P<path>/.*)?", "tree"),
    ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", _PREFIX + r"(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "lfs_part"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "lfs_complete"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET|HEAD", _PREFIX + _REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


if __name__ == "__main__":
    with HubServer(Path(sys.argv[1])) as hub:
        print(hub.url, flush=True)
        while True:
            time.sleep(3600)
