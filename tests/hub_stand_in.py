"""The Hugging Face Hub as far as an upload and a download need it, on this machine.

It keeps repositories in memory, records every request, and refuses what the real one refuses: a request without a valid
token, another user's name, a repository that is not there, a commit that names a large file it was never given, a card
whose header is not valid. `huggingface_hub` reads HF_ENDPOINT when it is imported, so what is to talk to it runs in a
process of its own, with `HubStandIn.environment`.
"""

import base64
import contextlib
import getpass
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

USER, TOKEN = "me", "hf_StandInTokenOfMe"
LARGE = (".parquet", ".png", ".safetensors")  # what the Hub keeps as large files, whatever their size


@dataclass
class Repository:
    """Files of each branch, and the operations of each commit."""

    private: bool
    kind: str
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """Those of `main`."""
        return self.branches["main"]

    @property
    def sha(self) -> str:
        """Name of the latest commit."""
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    def at(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or the latest commit."""
        return self.branches.get("main" if revision == self.sha else revision)


@dataclass
class HubStandIn:
    """A running stand-in; `repositories` by `KIND/USER/NAME`, KIND one of models, datasets, spaces."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process that takes this for the Hub, and has caches of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "HUB_"))}
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        own["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # `evaluate` would count them at an address of its own
        return {**kept, **own, **({"HF_TOKEN": token} if token else {}), "PYTHONPATH": str(Path(__file__).parents[1])}

    def leaks(self, *secrets: object) -> list[str]:
        """Every uploaded file that holds one of these, this machine's user or home, and what it holds."""
        return [
            f"{name} holds {secret}"
            for name, content in self.uploaded()
            for secret in private_words(*secrets)
            if secret.encode() in content
        ]

    def uploaded(self) -> Iterator[tuple[str, bytes]]:
        """Every file of every branch of every repository, and all that commits say beside their files."""
        for name, repository in self.repositories.items():
            for files in repository.branches.values():
                yield from ((f"{name}/{path}", content) for path, content in files.items())
            for commit in repository.commits:
                yield f"{name}: {commit['summary']}", json.dumps(commit).encode()


def private_words(*secrets: object) -> list[str]:
    """What no published file may hold: these, and where and as whom this runs."""
    here = [str(Path.home()), str(Path(__file__).parents[1]), f"/{getpass.getuser()}", f"{getpass.getuser()}@"]
    return [*map(str, secrets), *here]


@contextlib.contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Run one on a free port."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", answer: Any = None):
        super().__init__(message)
        self.status, self.code, self.answer = status, code, answer or {"error": message}


class _Handler(BaseHTTPRequestHandler):
    """Each request goes to the method whose pattern fits its path."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.body = self._read_body()
        self.sent: dict[str, str] = {}
        try:
            for pattern, method in _ROUTES.items():
                if match := re.fullmatch(pattern, path):
                    answer = method(self, **match.groupdict())
                    break
            else:
                raise _RefusedError(404, f"the stand-in knows no {self.command} {path}")
            status = 200
        except _RefusedError as error:
            status, answer = error.status, error.answer
            self.sent |= {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **self.sent}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # ---- Who asks, and for what ----

    def _known(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return given is not None

    def _check_owner(self, repo: str) -> None:
        if not self._known():
            raise _RefusedError(401, "Invalid username or password.")
        if repo.split("/")[0] != USER:
            raise _RefusedError(403, "You don't have the rights to create or change this repository")

    def _repository(self, kind: str, repo: str) -> Repository:
        repository = self.hub.repositories.get(f"{kind or 'models'}/{repo}")
        if repository is None or (repository.private and not self._known()):
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        return repository

    def _files(self, kind: str, repo: str, revision: str) -> dict[str, bytes]:
        files = self._repository(kind, repo).at(revision)
        if files is None:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return files

    # ---- Uploading ----

    def create(self) -> Any:
        asked = json.loads(self.body)
        repo, kind = f"{asked['organization'] or USER}/{asked['name']}", f"{asked.get('type') or 'model'}s"
        self._check_owner(repo)
        answer = {"url": f"{self.hub.address}/{'' if kind == 'models' else kind + '/'}{repo}"}
        if f"{kind}/{repo}" in self.hub.repositories:
            raise _RefusedError(409, "You already created this repo", answer=answer)
        if kind == "spaces" and asked.get("sdk") != "gradio":
            raise _RefusedError(400, f"sdk {asked.get('sdk')!r}")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[f"{kind}/{repo}"] = Repository(private, kind)
        return answer

    def branch(self, kind: str, repo: str, revision: str) -> Any:
        self._check_owner(repo)
        repository = self._repository(kind, repo)
        repository.branches.setdefault(revision, dict(repository.files))
        return {}

    def validate_yaml(self) -> Any:
        asked = json.loads(self.body)
        errors = [{"message": error} for error in header_errors(asked["content"], asked["repoType"])]
        if errors:
            raise _RefusedError(400, "Invalid metadata", answer={"errors": errors, "warnings": []})
        return {"errors": [], "warnings": []}

    def preupload(self, kind: str, repo: str, revision: str) -> Any:
        self._check_owner(repo)
        there = self._files(kind, repo, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = _oid(path, there[path]) if path in there else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, kind: str, repo: str) -> Any:
        self._check_owner(repo)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.large:
                item["actions"] = {"upload": {"href": f"{self.hub.address}/large/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def put_large(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, "the content is another than was announced")
        self.hub.large[oid] = self.body
        return {}

    def commit(self, kind: str, repo: str, revision: str) -> Any:
        self._check_owner(repo)
        files = self._files(kind, repo, revision)
        (_, header), *operations = [
            (line["key"], line["value"]) for line in map(json.loads, self.body.decode().splitlines())
        ]
        changes: dict[str, bytes | None] = {}
        for key, value in operations:
            if key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _RefusedError(400, f"{value['path']}: its content was never uploaded")
                changes[value["path"]] = self.hub.large[value["oid"]]
            else:
                changes[value["path"]] = None
        for path, content in changes.items():
            if content is None:
                del files[path]
            else:
                files[path] = content
        repository = self._repository(kind, repo)
        paths = {path: "deleted" if content is None else "added" for path, content in changes.items()}
        repository.commits.append({**header, "revision": revision, "paths": paths})
        return {"commitUrl": f"{self.hub.address}/{repo}/commit/{repository.sha}", "commitOid": repository.sha}

    # ---- Downloading ----

    def info(self, kind: str, repo: str, revision: str | None = None) -> Any:
        files, repository = self._files(kind, repo, revision or "main"), self._repository(kind, repo)
        known = {"_id": repo, "id": repo, "sha": repository.sha, "private": repository.private, "tags": []}
        return {**known, "siblings": [{"rfilename": path} for path in files]}

    def tree(self, kind: str, repo: str, revision: str, path: str | None = None) -> Any:
        files = self._files(kind, repo, revision)
        below = {name: content for name, content in files.items() if not path or name.startswith(f"{path}/")}
        if path and not below:
            raise _RefusedError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        folders = {str(parent) for name in below for parent in PurePosixPath(name).parents} - {"."}
        listed = [self._entry(name, files) for name in (*folders, *below)]
        recursive = "recursive=true" in self.path.lower()
        return [entry for entry in listed if recursive or str(PurePosixPath(entry["path"]).parent) == (path or ".")]

    def paths_info(self, kind: str, repo: str, revision: str) -> Any:
        files = self._files(kind, repo, revision)
        asked = json.loads(self.body)["paths"]
        return [self._entry(p, files) for p in asked if p in files or any(f.startswith(f"{p}/") for f in files)]

    def _entry(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        if path not in files:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
        return {"type": "file", "path": path, "oid": _oid(path, files[path]), "size": len(files[path])}

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> bytes:
        files = self._files(kind, repo, revision)
        self.sent["X-Repo-Commit"] = self._repository(kind, repo).sha
        if path not in files:
            raise _RefusedError(404, f"{path} does not exist", "EntryNotFound")
        self.sent["ETag"] = f'"{_oid(path, files[path])}"'
        return files[path]


def _oid(path: str, content: bytes) -> str:
    """Git's name of a file's content, that of the large file storage where it is kept there."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}"
_PAGE = rf"/(?:(?P<kind>datasets|spaces)/)?{_REPO}"
_ROUTES: dict[str, Callable[..., Any]] = {
    r"/api/repos/create": _Handler.create,
    r"/api/validate-yaml": _Handler.validate_yaml,
    rf"{_API}(?:/revision/(?P<revision>[^/]+))?": _Handler.info,
    rf"{_API}/branch/(?P<revision>.+)": _Handler.branch,
    rf"{_API}/preupload/(?P<revision>[^/]+)": _Handler.preupload,
    rf"{_API}/commit/(?P<revision>[^/]+)": _Handler.commit,
    rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?": _Handler.tree,
    rf"{_API}/paths-info/(?P<revision>[^/]+)": _Handler.paths_info,
    rf"{_PAGE}\.git/info/lfs/objects/batch": _Handler.batch,
    rf"{_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": _Handler.resolve,
    r"/large/(?P<oid>[0-9a-f]{64})": _Handler.put_large,
}


def header_errors(card: str, kind: str) -> list[str]:
    """What the Hub would not take in a card's YAML header, of what it documents."""
    match = REGEX_YAML_BLOCK.search(card)
    if match is None:
        return ["there is no header"]
    header = yaml.safe_load(match[2])
    errors = []
    if header.get("license") not in ("apache-2.0", "other"):
        errors.append(f"license {header.get('license')!r}")
    if header.get("license") == "other" and not {"license_name", "license_link"} <= header.keys():
        errors.append("another licence needs its name and link")
    if kind == "space" and not {"title", "emoji", "sdk", "sdk_version", "app_file"} <= header.keys():
        errors.append("a Space needs title, emoji, sdk, sdk_version and app_file")
    if kind == "space" and len(header.get("short_description", "")) > 60:
        errors.append("short_description is longer than 60 characters")
    for model in header.get("model-index", ()):
        for result in model["results"]:
            needed = [result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name")]
            values = [metric.get(key) for metric in result["metrics"] for key in ("type", "value")]
            if not model.get("name") or not values or None in [*needed, *values]:
                errors.append(f"model-index: {result} lacks something")
    return errors
