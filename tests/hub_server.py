"""A Hugging Face Hub on the loopback interface, in memory, for tests: models, and Spaces as far as files go.

Speaks what `huggingface_hub` and `transformers` ask for: accounts, repositories, branches and tags, regular and LFS
uploads, atomic commits, downloads with ranges. It forgets everything when it stops and is no mirror for real use;
docs/offline.md says what is.

    with HubServer() as hub:
        subprocess.run([sys.executable, "client.py"], env=hub.environment(tmp_path))
        assert "config.json" in hub.files("org/model")
"""

import base64
import hashlib
import itertools
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, ORGANIZATION = "tester", "org"
WRITE_TOKEN, READ_TOKEN = "hf_test_write", "hf_test_read"


@dataclass(frozen=True)
class Blob:
    """One version of a file."""

    content: bytes
    lfs: bool

    @property
    def sha1(self) -> str:
        """git's id of what git itself stores: the content, or the pointer to it."""
        data = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        oid = f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return b"version https://git-lfs.github.com/spec/v1\n" + oid.encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.sha1


@dataclass
class Repository:
    """Commits by id, each the whole tree; branches and tags point at them."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, Blob]) -> str:
        listing = json.dumps([sorted((path, blob.sha1) for path, blob in tree.items()), len(self.commits)])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[oid] = tree
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class HttpError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message} | (headers or {})
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD /path` matches."""

    pattern: str
    status: int | None
    times: int


class HubServer:
    """The server; a context manager.

    Args:
        lfs_suffixes (`tuple[str, ...]`, *optional*): Files stored through LFS; the rest goes inline into the commit.
    """

    def __init__(self, lfs_suffixes: tuple[str, ...] = (".safetensors", ".png")):
        self.lfs_suffixes = lfs_suffixes
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: str | os.PathLike, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """Environment of a client process: this server, its own cache, online, LFS rather than xet."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": os.fspath(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return environment | ({} if token is None else {"HF_TOKEN": token})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path."""
        repository = self.repositories[repo_id]
        return {path: blob.content for path, blob in repository.commits[repository.resolve(revision)].items()}

    def head(self, repo_id: str, branch: str = "main") -> str:
        return self.repositories[repo_id].branches[branch]

    def fail(self, pattern: str, status: int | None = None, times: int = 1) -> None:
        """Makes requests fail whose `METHOD /path` matches.

        With this status, with a login page in HTML (200), or with a connection cut midway (`None`).
        """
        self.faults.append(Fault(pattern, status, times))


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no news."""


Route = Callable[..., Any]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    # a Space is the repository "spaces/{id}"
    pattern = pattern.replace("/api/models/{id}", r"/api/(models|(?P<kind>spaces))/{id}")
    pattern = re.sub(r"^/\{id\}", r"/((?P<kind>spaces)/)?{id}", pattern)
    pattern = pattern.replace("{id}", r"(?P<repo_id>[^/]+/[^/]+)").replace("{rev}", r"(?P<revision>[^/]+)")

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HttpServer

    def log_message(self, *args) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        request = f"{self.command} {url.path}"
        with hub.lock:
            hub.requests.append(request)
            fault = next((f for f in hub.faults if f.times and re.search(f.pattern, request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status is None:
            # half of the body has arrived when the line goes dead
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self._read_body()
        try:
            if fault is not None and fault.status == 200:
                self.send(200, b"<!DOCTYPE html><title>Log in</title>", {"Content-Type": "text/html"})
                return
            if fault is not None:
                raise HttpError(fault.status, f"injected {fault.status}")
            self.role = self._authenticate()
            with hub.lock:
                self._dispatch(url.path)
        except HttpError as error:
            self.send(error.status, {"error": str(error)}, error.headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _dispatch(self, path: str) -> None:
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command.replace("HEAD", "GET"):
                groups = {key: unquote(value) for key, value in match.groupdict(default="").items()}
                if groups.pop("kind", ""):
                    groups["repo_id"] = f"spaces/{groups['repo_id']}"
                return function(self, self.server.hub, **groups)
        raise HttpError(404, f"no such endpoint: {self.command} {path}")

    def _authenticate(self) -> str | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        role = self.server.hub.tokens.get(header.removeprefix("Bearer "))
        if role is None:
            raise HttpError(401, "Invalid credentials in Authorization header")
        return role

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        """One write per answer: a body sent after its headers would wait for the client's acknowledgment."""
        content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        lines = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        head = f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}\r\n"
        head += "".join(f"{key}: {value}\r\n" for key, value in lines.items())
        self.wfile.write(head.encode() + b"\r\n" + (b"" if self.command == "HEAD" else content))

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.server.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.role is None):
            status = 404 if self.role else 401  # as the real one: without a token, missing and private look alike
            raise HttpError(status, "Repository not found", "RepoNotFound")
        if write:
            self.require_write(repo_id)
        return repository

    def require_write(self, repo_id: str) -> None:
        if self.role is None:
            raise HttpError(401, "Invalid username or password.")
        if self.role != "write" or repo_id.removeprefix("spaces/").split("/")[0] not in (USER, ORGANIZATION):
            raise HttpError(403, f"You don't have the rights to write to {repo_id}")


# --- accounts and repositories ---------------------------------------------------------------------------------------


@route("GET", "/api/whoami-v2")
def whoami(handler: _Handler, hub: HubServer) -> None:
    if handler.role is None:
        raise HttpError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": handler.role}
    account = {"name": USER, "type": "user", "orgs": [{"name": ORGANIZATION, "type": "org"}]}
    handler.send(200, account | {"auth": {"type": "access_token", "accessToken": token}})


def _requested(request: dict[str, Any]) -> str:
    kind = "spaces/" if request.get("type") == "space" else ""
    return f"{kind}{request.get('organization') or USER}/{request['name']}"


@route("POST", "/api/repos/create")
def create_repository(handler: _Handler, hub: HubServer) -> None:
    request = handler.json()
    repo_id = _requested(request)
    handler.require_write(repo_id)
    answer = {"url": f"{hub.url}/{repo_id}", "name": repo_id.removeprefix("spaces/")}
    if request.get("type") == "space" and not request.get("sdk"):
        raise HttpError(400, "a Space needs an sdk")
    if repo_id in hub.repositories:
        return handler.send(409, answer | {"error": "You already created this model repo"})
    private = request.get("private", request.get("visibility") == "private")
    repository = hub.repositories[repo_id] = Repository(private=bool(private))
    repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
    handler.send(200, answer)


@route("DELETE", "/api/repos/delete")
def delete_repository(handler: _Handler, hub: HubServer) -> None:
    request = handler.json()
    repo_id = _requested(request)
    handler.repository(repo_id, write=True)
    del hub.repositories[repo_id]
    handler.send(200)


@route("POST", "/api/validate-yaml")
def validate_yaml(handler: _Handler, hub: HubServer) -> None:
    try:
        _card_metadata(handler.json()["content"])
    except yaml.YAMLError as error:
        return handler.send(400, {"errors": [{"message": str(error)}], "warnings": []})
    handler.send(200, {"errors": [], "warnings": []})


@route("GET", "/api/models/{id}(/revision/{rev})?")
def model_info(handler: _Handler, hub: HubServer, repo_id: str, revision: str) -> None:
    repository = handler.repository(repo_id)
    oid = repository.resolve(revision or "main")
    tree = repository.commits[oid]
    card = _card_metadata(tree["README.md"].content.decode()) if "README.md" in tree else {}
    info = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": oid, "private": repository.private}
    info |= {"siblings": [_sibling(path, blob, "blobs" in handler.query) for path, blob in sorted(tree.items())]}
    info |= {key: card.get(key) for key in ("library_name", "pipeline_tag")}
    info |= {"tags": card.get("tags") or [], "cardData": card}
    handler.send(200, info | {"lastModified": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")})


def _sibling(path: str, blob: Blob, details: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if details:
        sibling |= {"size": len(blob.content), "blobId": blob.sha1}
    if details and blob.lfs:
        sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return sibling


def _card_metadata(text: str) -> dict[str, Any]:
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, flags=re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


# --- looking around --------------------------------------------------------------------------------------------------


@route("GET", "/api/models/{id}/tree/{rev}(/(?P<folder>.*))?")
def tree(handler: _Handler, hub: HubServer, repo_id: str, revision: str, folder: str) -> None:
    repository = handler.repository(repo_id)
    prefix = f"{folder.strip('/')}/" if folder else ""
    files = repository.commits[repository.resolve(revision)]
    inside = {path: blob for path, blob in files.items() if path.startswith(prefix)}
    if prefix and not inside:
        raise HttpError(404, f"{folder} does not exist", "EntryNotFound")
    recursive = handler.query.get("recursive", "").lower() in ("true", "1")
    handler.send(200, list(_entries(inside, prefix, recursive)))


def _entries(files: dict[str, Blob], prefix: str, recursive: bool) -> Iterator[dict[str, Any]]:
    folders = set()
    for path, blob in sorted(files.items()):
        *parents, _ = path.removeprefix(prefix).split("/")
        names = list(itertools.accumulate(parents, "{}/{}".format))
        for folder in names if recursive else names[:1]:
            if folder not in folders:
                folders.add(folder)
                yield {"type": "directory", "path": prefix + folder, "oid": "0" * 40, "size": 0}
        if recursive or not parents:
            yield _file_entry(path, blob)


def _file_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.sha1}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return entry


@route("POST", "/api/models/{id}/paths-info/{rev}")
def paths_info(handler: _Handler, hub: HubServer, repo_id: str, revision: str) -> None:
    repository = handler.repository(repo_id)
    files = repository.commits[repository.resolve(revision)]
    paths = parse_qs(handler.body.decode()).get("paths", [])
    handler.send(200, [_file_entry(path, files[path]) for path in paths if path in files])


@route("GET", "/api/models/{id}/refs")
def refs(handler: _Handler, hub: HubServer, repo_id: str) -> None:
    repository = handler.repository(repo_id)

    def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

    branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
    handler.send(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


@route("POST", "/api/models/{id}/branch/{rev}")
def create_branch(handler: _Handler, hub: HubServer, repo_id: str, revision: str) -> None:
    repository = handler.repository(repo_id, write=True)
    if revision in repository.branches:
        raise HttpError(409, f"Reference already exists: {revision}")
    repository.branches[revision] = repository.resolve(handler.json().get("startingPoint") or "main")
    handler.send(200)


@route("POST", "/api/models/{id}/tag/{rev}")
def create_tag(handler: _Handler, hub: HubServer, repo_id: str, revision: str) -> None:
    repository, name = handler.repository(repo_id, write=True), handler.json()["tag"]
    if name in repository.tags:
        raise HttpError(409, f"Tag already exists: {name}")
    repository.tags[name] = repository.resolve(revision)
    handler.send(200)


# --- uploads ---------------------------------------------------------------------------------------------------------


@route("POST", "/api/models/{id}/preupload/{rev}")
def preupload(handler: _Handler, hub: HubServer, repo_id: str, revision: str) -> None:
    repository = handler.repository(repo_id, write=True)
    current = repository.commits[repository.resolve(revision)]
    answers: list[dict[str, Any]] = []
    for request in handler.json()["files"]:
        path = request["path"]
        mode = "lfs" if path.endswith(hub.lfs_suffixes) else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        if path in current:
            answers[-1]["oid"] = current[path].etag
    handler.send(200, {"files": answers})


@route("POST", "/{id}.git/info/lfs/objects/batch")
def lfs_batch(handler: _Handler, hub: HubServer, repo_id: str) -> None:
    handler.repository(repo_id, write=True)
    objects = []
    for request in handler.json()["objects"]:
        answer = {"oid": request["oid"], "size": request["size"]}
        if request["oid"] not in hub.lfs:
            answer["actions"] = {"upload": {"href": f"{hub.url}/lfs/{request['oid']}", "header": {}}}
        objects.append(answer)
    handler.send(200, {"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(handler: _Handler, hub: HubServer, oid: str) -> None:
    if hashlib.sha256(handler.body).hexdigest() != oid:
        raise HttpError(400, "the content does not have this sha256")
    hub.lfs[oid] = handler.body
    handler.send(200)


@route("POST", "/api/models/{id}/commit/{rev}")
def commit(handler: _Handler, hub: HubServer, repo_id: str, revision: str) -> None:
    repository = handler.repository(repo_id, write=True)
    if revision not in repository.branches:
        raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    files = dict(repository.commits[repository.branches[revision]])
    for line in map(json.loads, handler.body.splitlines()):
        value = line["value"]
        match line["key"]:
            case "header":
                if value.get("parentCommit") not in (None, repository.branches[revision]):
                    raise HttpError(412, "A commit has happened since. Please refresh and try again.")
            case "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            case "lfsFile":
                if value["oid"] not in hub.lfs:
                    raise HttpError(400, f"the LFS object of {value['path']} was never uploaded")
                files[value["path"]] = Blob(hub.lfs[value["oid"]], lfs=True)
            case "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HttpError(404, "A file with this name doesn't exist", "EntryNotFound")
            case "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
    oid = repository.commit(revision, files)
    handler.send(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}"})


# --- downloads -------------------------------------------------------------------------------------------------------


@route("GET", "/{id}/resolve/{rev}/(?P<path>.+)")
def resolve(handler: _Handler, hub: HubServer, repo_id: str, revision: str, path: str) -> None:
    repository = handler.repository(repo_id)
    oid = repository.resolve(revision)
    blob = repository.commits[oid].get(path)
    headers = {"X-Repo-Commit": oid}
    if blob is None:  # the client remembers a missing file by this commit
        raise HttpError(404, "Entry not found", "EntryNotFound", headers)
    headers |= {"ETag": f'"{blob.etag}"', "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.etag}"'}
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if span is None:
        return handler.send(200, blob.content, headers)
    start, end = int(span[1]), min(int(span[2] or len(blob.content) - 1), len(blob.content) - 1)
    if start >= len(blob.content):
        raise HttpError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(blob.content)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(blob.content)}"
    handler.send(206, blob.content[start : end + 1], headers)
