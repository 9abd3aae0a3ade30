"""A Hub on this machine: the HTTP interface that `huggingface_hub` speaks, over a folder of content-addressed files.

Repositories with branches, tags, commits and pull requests, tokens, private repositories, Git LFS (basic transfer) and
regular files, ranges, a log of requests, and a switch that cuts uploads short. Knows nothing of models, and nothing of
Xet: clients that are to upload LFS files set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 1 << 16
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """A stored file: its SHA-256, its git id, its size in bytes, and whether Git LFS keeps it."""

    sha256: str
    oid: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict:
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": 128} if self.lfs else None
        return {"type": "file", "path": path, "size": self.size, "oid": self.oid} | ({"lfs": lfs} if lfs else {})


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]
    parent: str | None


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)  # titles; their branches are refs/pr/1, …

    def find(self, revision: str) -> Commit:
        oid = {**self.tags, **self.branches}.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, "RevisionNotFound", f"no revision {revision}")
        return self.commits[oid]

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        text = json.dumps([parent, title, len(self.commits), {path: blob.sha256 for path, blob in files.items()}])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), title, files, parent)
        self.commits[commit.oid], self.branches[branch] = commit, commit.oid
        return commit


class Refused(Exception):
    """An answer other than success: status, `X-Error-Code` and message."""


class Cut(Exception):
    """The connection is dropped without an answer."""


class HubServer(ThreadingHTTPServer):
    """`with HubServer(folder) as hub`: serves at `hub.url` until the block ends.

    Args:
        folder: where file contents are kept.

    Attributes:
        tokens: user by token. Users may write below their own name and read their own private repositories.
        lfs: suffixes that go through Git LFS; nothing does where it is empty.
        log: (method, path, bytes of body) of each request that was answered.
        cut_after: uploaded bytes after which the connection breaks, once; None for never.
        stays_down: whether every later connection breaks, too.
        was_cut: set when that has happened.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = {"hf_of_you": "you", "hf_of_them": "them"}
        self.lfs: tuple[str, ...] = ()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.log: list[tuple[str, str, int]] = []
        self.cut_after: int | None = None
        self.stays_down = self.is_down = False
        self.was_cut = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Contents of a repository's files."""
        files = self.repositories[kind, name].find(revision).files
        return {path: (self.folder / blob.sha256).read_bytes() for path, blob in files.items()}

    def mend(self) -> None:
        """Connections hold again; the log starts anew."""
        self.stays_down = self.is_down = False
        self.log.clear()

    def store(self, content: bytes, lfs: bool) -> Blob:
        digest = hashlib.sha256(content).hexdigest()
        partial = self.folder / f"{digest}.{threading.get_ident()}"
        partial.write_bytes(content)
        partial.replace(self.folder / digest)
        return Blob(digest, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content), lfs)


class Handler(BaseHTTPRequestHandler):
    """One connection; the methods from `create` on are the routes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = PIECE
    server: HubServer

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        try:
            if self.server.is_down:
                raise Cut
            body = self.read_body()
            path = urlsplit(self.path).path
            self.server.log.append((self.command, path, len(body)))
            for methods, pattern, route in ROUTES:
                if self.command in methods.split() and (match := re.fullmatch(pattern, path)):
                    parts = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    with self.server.lock:
                        return route(self, body, **parts)
            raise Refused(404, "EntryNotFound", f"no route {self.command} {path}")
        except Refused as refused:
            status, code, message = refused.args
            self.reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})
        except Cut:
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        """The body, whole or in chunks; an upload is cut where the server is told to."""
        is_upload = self.command == "PUT" or "/commit/" in self.path
        body = bytearray()
        for size in self.chunk_sizes():
            while size:
                piece = self.rfile.read(min(size, PIECE))
                if not piece:
                    raise Cut
                size -= len(piece)
                body += piece
                self.count(len(piece) if is_upload else 0)
        return bytes(body)

    def chunk_sizes(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield int(self.headers.get("Content-Length", 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def count(self, size: int) -> None:
        hub = self.server
        with hub.lock:
            if hub.cut_after is None or not size:
                return
            hub.cut_after -= size
            if hub.cut_after > 0:
                return
            hub.cut_after, hub.is_down = None, hub.stays_down
        hub.was_cut.set()
        raise Cut

    def reply(self, content, status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(data)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.server.tokens.get(token)

    def repository(self, kind: str | None, name: str, write: bool = False) -> Repository:
        repository, user = self.server.repositories.get((kind or "models", name)), self.user()
        if repository is None or (repository.private and name.split("/")[0] != user):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and name.split("/")[0] != user:
            raise Refused(403 if user else 401, "", f"{user or 'nobody'} may not write to {name}")
        return repository

    def asked(self, body) -> tuple[str, str]:
        asked = json.loads(body)
        return f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or self.user()}/{asked['name']}"

    def create(self, body):
        (kind, name), user = self.asked(body), self.user()
        if name.split("/")[0] != user:
            raise Refused(403 if user else 401, "", f"{user or 'nobody'} may not create {name}")
        url = f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.server.repositories:
            return self.reply({"url": url, "error": "You already created this repo"}, 409)
        repository = Repository(json.loads(body).get("visibility") == "private")
        repository.commit("main", "initial commit", {".gitattributes": self.server.store(b"", False)})
        self.server.repositories[kind, name] = repository
        self.reply({"url": url})

    def delete(self, body):
        kind, name = self.asked(body)
        self.repository(kind, name, write=True)
        del self.server.repositories[kind, name]
        self.reply({})

    def listing(self, body, kind):
        author = parse_qs(urlsplit(self.path).query).get("author", [None])[0]
        names = [
            name
            for (k, name), repository in self.server.repositories.items()
            if k == kind and author in (None, name.split("/")[0])
            if not repository.private or name.split("/")[0] == self.user()
        ]
        self.reply([{"id": name, "_id": name} for name in names])

    def info(self, body, kind, name, revision=None):
        repository = self.repository(kind, name)
        commit = repository.find(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        shown = {"id": name, "sha": commit.oid, "siblings": siblings, "tags": [], "private": repository.private}
        self.reply(shown | {"_id": name, "gated": False, "downloads": 0, "likes": 0})

    def tree(self, body, kind, name, revision, below=None):
        files = self.repository(kind, name).find(revision).files
        shown = [blob.describe(path) for path, blob in sorted(files.items()) if path.startswith(f"{below or ''}")]
        if below and not shown:
            raise Refused(404, "EntryNotFound", f"no folder {below}")
        self.reply(shown)

    def refs(self, body, kind, name):
        repository = self.repository(kind, name)
        branches = {name: oid for name, oid in repository.branches.items() if not name.startswith("refs/")}
        groups = {"branches": ("heads", branches), "tags": ("tags", repository.tags)}
        shown = {
            group: [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": oid} for ref, oid in refs.items()]
            for group, (folder, refs) in groups.items()
        }
        self.reply(shown | {"converts": [], "pullRequests": []})

    def commits(self, body, kind, name, revision):
        repository = self.repository(kind, name)
        commit, shown = repository.find(revision), []
        while commit:
            shown.append({"id": commit.oid, "title": commit.title, "message": "", "authors": [], "date": DATE})
            commit = repository.commits.get(commit.parent)
        self.reply(shown)

    def branch(self, body, kind, name, revision):
        repository = self.repository(kind, name, write=True)
        if revision in repository.branches:
            return self.reply({"error": "Reference already exists"}, 409)
        start = (json.loads(body) if body else {}).get("startingPoint", "main")
        repository.branches[revision] = repository.find(start).oid
        self.reply({})

    def tag(self, body, kind, name, revision):
        repository = self.repository(kind, name, write=True)
        repository.tags[json.loads(body)["tag"]] = repository.find(revision).oid
        self.reply({})

    def open_pull_request(self, body, kind, name):
        repository = self.repository(kind, name)
        repository.pull_requests.append(json.loads(body)["title"])
        number = len(repository.pull_requests)
        repository.branches[f"refs/pr/{number}"] = repository.find("main").oid
        self.reply({"num": number})

    def pull_request(self, body, kind, name, number):
        title = self.repository(kind, name).pull_requests[int(number) - 1]
        shown = {"num": int(number), "title": title, "isPullRequest": True, "status": "draft", "events": []}
        shown |= {"createdAt": DATE, "repo": {"name": name, "type": kind[:-1]}, "filesWithConflicts": []}
        self.reply(shown | {"changes": {"base": "refs/heads/main"}, "author": {"name": self.user()}})

    def preupload(self, body, kind, name, revision):
        files = self.repository(kind, name, write=True).find(revision).files
        shown = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(self.server.lfs) else "regular"
            same = {"oid": files[path].etag} if path in files else {}
            shown.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | same)
        self.reply({"files": shown})

    def lfs_batch(self, body, kind, name):
        self.repository(kind, name, write=True)
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
            objects.append(item | ({} if (self.server.folder / item["oid"]).is_file() else upload))
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, body, oid):
        if self.server.store(body, True).sha256 != oid:
            raise Refused(400, "", "The content is not what its name says")
        self.reply({})

    def commit(self, body, kind, name, revision):
        repository = self.repository(kind, name, write=True)
        files = dict(repository.find(revision).files)
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                content = self.server.folder / value["oid"]
                if not content.is_file():
                    raise Refused(400, "", f"{value['path']} was never uploaded")
                files[value["path"]] = self.server.store(content.read_bytes(), True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        commit = repository.commit(revision, title, files)
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid})

    def resolve(self, body, kind, name, revision, path):
        commit = self.repository(kind, name).find(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.reply({}, 404, headers | missing)
        blob = commit.files[path]
        headers["ETag"] = f'"{blob.etag}"'
        content = (self.server.folder / blob.sha256).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.reply(content, 200, headers)
        start, end = int(asked[1]), min(int(asked[2] or blob.size - 1), blob.size - 1)
        self.reply(content[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{blob.size}"})


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_GIT = r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)"
_REVISION = r"/(?P<revision>[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", lambda handler, body: handler.reply({"name": handler.user(), "orgs": []})),
    ("POST", r"/api/validate-yaml", lambda handler, body: handler.reply({"warnings": [], "errors": []})),
    ("POST", r"/api/repos/create", Handler.create),
    ("DELETE", r"/api/repos/delete", Handler.delete),
    ("GET", r"/api/(?P<kind>models|datasets)", Handler.listing),
    ("GET", _API, Handler.info),
    ("GET", _API + r"/revision" + _REVISION, Handler.info),
    ("GET", _API + r"/tree" + _REVISION + r"(?:/(?P<below>.+))?", Handler.tree),
    ("GET", _API + r"/refs", Handler.refs),
    ("GET", _API + r"/commits" + _REVISION, Handler.commits),
    ("POST", _API + r"/branch" + _REVISION, Handler.branch),
    ("POST", _API + r"/tag" + _REVISION, Handler.tag),
    ("POST", _API + r"/discussions", Handler.open_pull_request),
    ("GET", _API + r"/discussions/(?P<number>\d+)", Handler.pull_request),
    ("POST", _API + r"/preupload" + _REVISION, Handler.preupload),
    ("POST", _API + r"/commit" + _REVISION, Handler.commit),
    ("POST", _GIT + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("HEAD GET", _GIT + r"/resolve" + _REVISION + r"/(?P<path>.+)", Handler.resolve),
)
