"""A Hugging Face Hub on loopback: the part of its API that the real client uses, over files that it really keeps.

It knows users and tokens, private and gated repositories, branches, tags, pull requests, large files on another host,
and the rules for cards; and it fails to order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

__all__ = ["FakeHub", "Fault", "Repo", "serve_hub"]

_PAGE = 3  # entries in an answer, so that every longer folder takes several
_LARGE = (".safetensors", ".onnx", ".onnx_data", ".npy", ".bin", ".parquet", ".tar")
_LICENSES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "bsd-3-clause", "other", "unknown"}  # of many
_TASKS = {"image-feature-extraction", "image-classification", "feature-extraction"}


@dataclass
class Repo:
    """A repository: commits are maps of paths to the sha256 of contents."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    downloads: int = 0
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    proposals: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request or (shortened) hash names."""
        named = self.branches | self.tags | self.proposals | {commit: commit for commit in self.commits}
        return named.get(revision)


@dataclass
class Fault:
    """What goes wrong: `cut` (in mid-file), `alter` (one bit), `slow` (a second before the second half) or a status.

    Attributes:
        path: part of the request's path.
        kind: see above.
        times: how often.
        method: of the request.
    """

    path: str
    kind: str | int
    times: int = 1
    method: str = "GET"


class FakeHub:
    """The state of the server; tests read and change it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.large_url = ""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users = {"hf_alice": ("alice", ["org"]), "hf_bob": ("bob", [])}
        self.private_by_default = False
        self.after: dict[str, Callable[[], object]] = {}  # done once, when a path was answered
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()

    def add(self, repo_id: str, files: Mapping[str, bytes], *, kind: str = "models", **options: Any) -> Repo:
        """A repository with one commit."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, **options)
        self.commit(repo, "main", files)
        return repo

    def model(self, repo_id: str) -> Repo:
        return self.repos["models", repo_id]

    def commit(self, repo: Repo, branch: str, files: Mapping[str, bytes | None], start: str | None = None) -> str:
        """Adds and (where the content is None) deletes files; gives the new commit."""
        with self.lock:
            parent = start or repo.branches.get(branch)
            tree = dict(repo.commits.get(parent or "", {}))
            for path, content in files.items():
                if content is None:
                    del tree[path]
                else:
                    tree[path] = self.store(content)
            return self.commit_tree(repo, branch, tree)

    def commit_tree(self, repo: Repo, branch: str, tree: dict[str, str]) -> str:
        name = json.dumps([repo.id, len(repo.commits), sorted(tree.items())]).encode()
        commit = hashlib.sha1(name).hexdigest()
        repo.commits[commit] = tree
        (repo.proposals if branch.startswith("refs/pr/") else repo.branches)[branch] = commit
        return commit

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blob(digest).write_bytes(content)
        return digest

    def blob(self, digest: str) -> Path:
        return self.root / digest

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        repo = self.model(repo_id)
        return self.blob(repo.commits[repo.commit_of(revision) or ""][path]).read_bytes()

    def files(self, repo_id: str, revision: str = "main") -> list[str]:
        repo = self.model(repo_id)
        return sorted(repo.commits[repo.commit_of(revision) or ""])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: FakeHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_GET(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    def do_PUT(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.place, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {self.place}")
        self.fault = self._take_fault()
        if self.fault and isinstance(self.fault.kind, int):
            # A rude server: what it was sent comes back in its message.
            self._refuse(self.fault.kind, "ToOrder", f"not for {self.headers.get('Authorization')}")
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user: str | None
        self.orgs: list[str]
        self.user, self.orgs = self.hub.users.get(token, (None, []))
        if token and self.user is None and not self.place.startswith("/large/"):
            self._refuse(401, None, "Invalid credentials in Authorization header", {"error": f"bad token {token}"})
            return
        self._route()
        if done := self.hub.after.pop(self.place, None):
            done()

    def _route(self) -> None:
        for method, pattern, action in _ROUTES:
            if method in {self.command, "GET" if self.command == "HEAD" else None} and (
                match := re.fullmatch(pattern, self.place)
            ):
                action(self, **match.groupdict())
                return
        self._refuse(404, None, f"no route {self.command} {self.place}")

    def _take_fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and fault.path in self.place:
                    fault.times -= 1
                    return fault
        return None

    # What is asked

    def whoami(self) -> None:
        if self.user is None:
            self._refuse(401, None, "Invalid username or password.")
        else:
            orgs = [{"name": name, "type": "org"} for name in self.orgs]
            self._answer({"type": "user", "name": self.user, "orgs": orgs, "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user
        repo_id = f"{owner}/{wanted['name']}"
        if self.user is None:
            self._refuse(401, None, "Invalid username or password.")
        elif owner not in {self.user, *self.orgs}:
            self._refuse(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        elif ("models", repo_id) in self.hub.repos:
            self._refuse(409, None, "You already created this model repo")
        else:
            private = wanted.get("visibility", "private" if self.hub.private_by_default else "public") == "private"
            self.hub.add(repo_id, {".gitattributes": b"*.onnx lfs\n"}, private=private)
            self._answer({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0"})

    def validate_card(self) -> None:
        problems = card_problems(json.loads(self.body)["content"])
        answer = {"errors": [{"message": problem} for problem in problems], "warnings": []}
        self._send(400 if problems else 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def search(self) -> None:
        found = []
        for (kind, repo_id), repo in sorted(self.hub.repos.items()):
            card = self._card(repo)
            tagged = set(self.query.get("filter", [])) <= set(self._tags(card))
            named = self.query.get("search", [""])[0].lower() in repo_id.lower()
            meant = self.query.get("pipeline_tag", [None])[0] in {None, card.get("pipeline_tag")}
            if kind == "models" and self._may_read(repo) and tagged and named and meant:
                found.append(self._found(repo, card))
        if set(self.query) - {"filter", "search", "limit", "pipeline_tag", "sort", "full", "config"}:
            self._refuse(400, None, f"cannot do {sorted(self.query)}")
        else:
            if self.query.get("sort") == ["downloads"]:
                found.sort(key=lambda about: -about["downloads"])
            self._answer(found[: int(self.query.get("limit", ["1000"])[0])])

    def _found(self, repo: Repo, card: dict[str, Any]) -> dict[str, Any]:
        """What a list of models says of one."""
        tree = repo.commits[repo.branches["main"]]
        about = self._about(repo, repo.branches["main"], card)
        keys = ["id", "private"] + (["sha", "siblings"] if self.query.get("full") else [])
        found = {key: about[key] for key in keys}
        found |= {"tags": self._tags(card), "downloads": repo.downloads, "pipeline_tag": card.get("pipeline_tag")}
        if self.query.get("config") and "config.json" in tree:
            config = json.loads(self.hub.blob(tree["config.json"]).read_bytes())
            found["config"] = {key: config[key] for key in ("architectures", "model_type") if key in config}
        return found

    @staticmethod
    def _tags(card: dict[str, Any]) -> list[str]:
        """The tags of a card, and those that the Hub makes of its other fields."""
        made = [f"license:{card['license']}"] if "license" in card else []
        made += [card["library_name"]] if "library_name" in card else []
        return [*card.get("tags", []), *made]

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        if (found := self._find(kind, repo)) and (commit := self._commit(found, revision)):
            self._answer(self._about(found, commit, self._card(found)))

    def refs(self, kind: str, repo: str) -> None:
        if found := self._find(kind, repo):
            named = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
            self._answer(
                {"converts": []}
                | {
                    key: [
                        {"name": name, "ref": f"refs/{place}/{name}", "targetCommit": at} for name, at in refs.items()
                    ]
                    for key, (place, refs) in named.items()
                }
            )

    def add_ref(self, kind: str, repo: str, what: str, name: str) -> None:
        found = self._find(kind, repo, write=True)
        if found is None:
            return
        wanted = json.loads(self.body or b"{}")
        start = found.commit_of((name if what == "tag" else wanted.get("startingPoint")) or "main")
        refs, key = (found.tags, wanted["tag"]) if what == "tag" else (found.branches, name)
        if start is None:
            self._refuse(404, "RevisionNotFound", "no such revision")
        elif key in refs:
            self._refuse(409, None, "the reference exists")
        else:
            refs[key] = start
            self._answer({})

    def tree(self, kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        found = self._find(kind, repo)
        commit = self._commit(found, revision) if found else None
        if found is None or commit is None:
            return
        inside = f"{folder}/" if folder else ""
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, digest in sorted(found.commits[commit].items()):
            if not path.startswith(inside):
                continue
            first, slash, _ = path.removeprefix(inside).partition("/")
            if slash:
                entries.setdefault(
                    inside + first, {"type": "directory", "oid": "0" * 40, "size": 0, "path": inside + first}
                )
            if deep or not slash:
                entries[path] = self._entry(path, digest)
        if inside and not entries:
            self._refuse(404, "EntryNotFound", "no such folder")
            return
        listed, start = list(entries.values()), int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + _PAGE < len(listed):
            base = f"http://{self.headers['Host']}{urlsplit(self.path).path}"
            more = f"recursive={str(deep).lower()}&cursor={start + _PAGE}"
            headers["Link"] = f'<{base}?{more}>; rel="next"'
        self._answer(listed[start : start + _PAGE], headers)

    def paths(self, kind: str, repo: str, revision: str) -> None:
        if (found := self._find(kind, repo)) and (commit := self._commit(found, revision)):
            files = found.commits[commit]
            answer = []
            for path in parse_qs(self.body.decode())["paths"]:
                if path in files:
                    answer.append(self._entry(path, files[path]))
                elif any(name.startswith(f"{path}/") for name in files):
                    answer.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
            self._answer(answer)

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        if (found := self._find(kind, repo, write=True)) and (commit := self._commit(found, revision)):
            answer = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                digest = found.commits[commit].get(path)
                entry = self._entry(path, digest) if digest else {}
                oid = entry.get("lfs", {}).get("oid") or entry.get("oid")
                mode = "lfs" if path.endswith(_LARGE) else "regular"
                answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._answer({"files": answer})

    def batch(self, repo: str) -> None:
        if self._find("models", repo, write=True) is None:
            return
        wanted = json.loads(self.body)
        objects = []
        for entry in wanted["objects"]:
            described = dict(entry)
            if not self.hub.blob(entry["oid"]).exists():
                actions = {"upload": f"/large/{entry['oid']}", "verify": f"/verify/{entry['oid']}"}
                described["actions"] = {name: {"href": self.hub.url + place} for name, place in actions.items()}
            objects.append(described)
        self._send(
            200, json.dumps({"transfer": "basic", "objects": objects}).encode(), {"Content-Type": "application/json"}
        )

    def put_large(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            self._refuse(400, None, "the content has another hash")
        else:
            self.hub.store(self.body)
            self._answer({})

    def verify_large(self, digest: str) -> None:
        if self.hub.blob(digest).exists() and json.loads(self.body)["size"] == self.hub.blob(digest).stat().st_size:
            self._answer({})
        else:
            self._refuse(404, None, "not stored")

    def commit(self, kind: str, repo: str, revision: str) -> None:
        found = self._find(kind, repo, write=True)
        head = self._commit(found, revision) if found else None
        if found is None or head is None:
            return
        with self.hub.lock:
            tree = dict(found.commits[head])
            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                match entry["key"]:
                    case "header":
                        if value.get("parentCommit", head) != head:
                            self._refuse(412, None, "A commit has happened since. Please refresh and try again.")
                            return
                    case "file":
                        tree[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
                    case "lfsFile":
                        assert self.hub.blob(value["oid"]).exists(), value
                        tree[value["path"]] = value["oid"]
                    case "deletedFile":
                        del tree[value["path"]]
                    case other:
                        self._refuse(400, None, f"cannot do {other}")
                        return
            proposed = self.query.get("create_pr", ["0"])[0] in {"1", "True", "true"}
            number = len(found.proposals) + 1
            oid = self.hub.commit_tree(found, f"refs/pr/{number}" if proposed else revision, tree)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        if proposed:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        self._answer(answer)

    def resolve(self, repo: str, revision: str, path: str, kind: str = "models") -> None:
        found = self._find(kind.strip("/") or "models", repo)
        commit = self._commit(found, revision) if found else None
        if found is None or commit is None:
            return
        if found.gated and repo.partition("/")[0] not in {self.user, *self.orgs}:
            self._refuse(
                403 if self.user else 401, "GatedRepo", f"Access to model {repo} is restricted. Please log in."
            )
        elif path not in found.commits[commit]:
            self._refuse(404, "EntryNotFound", "Entry not found", headers={"X-Repo-Commit": commit})
        else:
            digest = found.commits[commit][path]
            headers = {"X-Repo-Commit": commit}
            if path.endswith(_LARGE):
                size = str(self.hub.blob(digest).stat().st_size)
                headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": size}
                self._send(302, b"", headers | {"Location": f"{self.hub.large_url}/large/{digest}"})
            else:
                data = self.hub.blob(digest).read_bytes()
                self._send_file(data, headers | {"ETag": f'"{_blob_id(data)}"'})

    def get_large(self, digest: str) -> None:
        assert "Authorization" not in self.headers, "the token was sent to another host"
        self._send_file(self.hub.blob(digest).read_bytes(), {"ETag": f'"{digest}"'})

    # How it is answered

    def _find(self, kind: str, repo_id: str, *, write: bool = False) -> Repo | None:
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or not self._may_read(repo):
            status, message = (404, "Repository not found") if self.user else (401, "Invalid username or password.")
            self._refuse(status, "RepoNotFound", message)
            return None
        proposing = self.user and self.query.get("create_pr")
        if write and repo_id.partition("/")[0] not in {self.user, *self.orgs} and not proposing:
            self._refuse(403, None, "you must have write access")
            return None
        return repo

    def _may_read(self, repo: Repo) -> bool:
        return not repo.private or repo.id.partition("/")[0] in {self.user, *self.orgs}

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.commit_of(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _entry(self, path: str, digest: str) -> dict[str, Any]:
        data = self.hub.blob(digest).read_bytes()
        entry = {"type": "file", "oid": _blob_id(data), "size": len(data), "path": path}
        if path.endswith(_LARGE):
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
        return entry

    def _card(self, repo: Repo) -> dict[str, Any]:
        digest = repo.commits[repo.branches["main"]].get("README.md")
        return card_metadata(self.hub.blob(digest).read_text("utf-8")) if digest else {}

    def _about(self, repo: Repo, commit: str, card: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": repo.id,
            "sha": commit,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "tags": card.get("tags", []),
            "cardData": {key: value for key, value in card.items() if key != "model-index"},
            "model-index": card.get("model-index"),
            "siblings": [
                {"rfilename": path} | ({"size": self.hub.blob(digest).stat().st_size} if "blobs" in self.query else {})
                for path, digest in sorted(repo.commits[commit].items())
            ],
        }

    def _answer(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(
        self, status: int, code: str | None, message: str, body: object = None, headers: dict[str, str] | None = None
    ) -> None:
        about = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        content = json.dumps(body or {"error": message}).encode()
        self._send(status, content, about | {"Content-Type": "application/json"})

    def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
        status, total = 200, len(data)
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            last = min(int(end or total), total - 1)
            headers = headers | {"Content-Range": f"bytes {start}-{last}/{total}"}
            data, status = data[int(start) : last + 1], 206
        if self.fault and self.fault.kind == "alter":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        self._send(status, data, headers | {"Accept-Ranges": "bytes"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(data) // 2
        if self.fault and self.fault.kind == "cut":
            self.wfile.write(data[:half])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(data[:half])
        if self.fault and self.fault.kind == "slow":
            self.wfile.flush()
            time.sleep(1)  # the fault that was ordered
        self.wfile.write(data[half:])


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def card_metadata(text: str) -> dict[str, Any]:
    """The YAML in front of a card."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def card_problems(text: str) -> list[str]:
    """What the Hub's documentation asks of a model card's metadata, as far as it concerns ours."""
    try:
        card = card_metadata(text)
    except yaml.YAMLError as exc:
        return [f"not YAML: {exc}"]
    problems = []
    if card.get("license", "unknown") not in _LICENSES:
        problems.append(f'"license" must be one of {sorted(_LICENSES)}')
    if card.get("license") == "other" and not re.fullmatch(r"[a-z0-9.-]+", str(card.get("license_name", ""))):
        problems.append('"license_name" is needed beside "other", of letters, digits, dots and hyphens')
    if card.get("pipeline_tag") not in _TASKS | {None}:
        problems.append(f'"pipeline_tag" must be one of {sorted(_TASKS)}')
    for key in ("tags", "datasets", "metrics"):
        if not isinstance(card.get(key, []), list) or not all(isinstance(value, str) for value in card.get(key, [])):
            problems.append(f'"{key}" must be a list of text')
    for model in card.get("model-index", []):
        if not model.get("name"):
            problems.append('"model-index[].name" is required')
        for result in model.get("results", [{}]):
            needed = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            problems += [f'"{part}.{key}" is required' for part, key in needed if not result.get(part, {}).get(key)]
            for metric in result.get("metrics") or [{}]:
                if not metric.get("type") or not isinstance(metric.get("value"), (int, float)):
                    problems.append('"metrics[].type" and a number as "metrics[].value" are required')
    return problems


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_KIND = r"/api/(?P<kind>models|datasets)/" + _REPO
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("GET", r"/api/models", _Handler.search),
    ("GET", _KIND, _Handler.info),
    ("GET", _KIND + r"/revision/(?P<revision>.+)", _Handler.info),
    ("GET", _KIND + r"/refs", _Handler.refs),
    ("POST", _KIND + r"/(?P<what>tag|branch)/(?P<name>.+)", _Handler.add_ref),
    ("GET", _KIND + r"/tree/(?P<revision>refs/pr/\d+|[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", _KIND + r"/paths-info/(?P<revision>.+)", _Handler.paths),
    ("POST", _KIND + r"/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", _KIND + r"/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", f"/{_REPO}" + r"\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(?P<digest>\w+)", _Handler.put_large),
    ("POST", r"/verify/(?P<digest>\w+)", _Handler.verify_large),
    ("GET", r"/large/(?P<digest>\w+)", _Handler.get_large),
    (
        "GET",
        r"/(?P<kind>datasets/)?" + _REPO + r"/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)",
        lambda handler, kind, **about: handler.resolve(kind=kind or "", **about),
    ),
]


@contextmanager
def serve_hub(root: Path) -> Iterator[FakeHub]:
    """A Hub that keeps its files under `root`; its `url` is the value for HF_ENDPOINT."""
    hub = FakeHub(root)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub)) as server:
        server.daemon_threads = True
        hub.url, hub.large_url = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
