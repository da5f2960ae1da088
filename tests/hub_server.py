"""A small Hub on 127.0.0.1, for the real clients: repositories with commits, branches, tags and LFS; and its faults.

    with HubServer() as hub:
        subprocess.run(command, env=os.environ | hub.environment(home))
        hub.fail("/commit/", status=500)
        hub.files("org/name", "v1.0.0")

Kept in memory. What requests need which answer: huggingface_hub 2.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_a_token_of_the_test_server"
LFS_FROM = 10_000  # bytes; weights are LFS files whatever their size


@dataclass
class Fault:
    """What is to go wrong in the next `times` requests whose path matches.

    status: answered; None cuts the connection, in the middle of what the client sends.
    """

    pattern: str
    status: int | None
    times: int
    method: str | None


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # {commit: {path: sha256}}
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        known = self.branches | self.tags | {commit: commit for commit in self.commits}
        return known.get(revision)

    def commit(self, branch: str, files: dict[str, str], message: str) -> str:
        """The files of a new commit, all of them."""
        content = json.dumps([self.branches.get(branch), sorted(files.items()), message, len(self.commits)])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit], self.messages[commit], self.branches[branch] = files, message, commit
        return commit


class HubServer:
    """Started by `with`; `url` is its endpoint."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # by sha256
        self.lfs: set[str] = set()  # those that were sent as LFS files
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # methods and paths
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Of a process that takes this for the Hub, with a cache of its own."""
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        env |= {"TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token or ""}
        return env | {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "" if token else "1"}

    def fail(self, pattern: str, status: int | None = None, times: int = 1, method: str | None = None) -> None:
        self.faults.append(Fault(pattern, status, times, method))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        repository = self.repositories[repo_id]
        files = repository.commits[repository.resolve(revision)]
        return {path: self.blobs[sha] for path, sha in files.items()}


class Client:
    """A process that takes a server for the Hub, and runs code; one for many tests, since importing takes seconds."""

    LOOP = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
for line in sys.stdin:
    scope = {}
    try:
        exec(json.loads(line), scope)
        answer = {"result": scope.get("result")}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(answer) + chr(10))
"""

    def __init__(self, hub: HubServer, home: Path):
        env = os.environ | hub.environment(home)
        command = [sys.executable, "-c", self.LOOP]
        self.process = subprocess.Popen(
            command, env=env, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str):
        """What the code calls `result`; a RuntimeError with what it raised."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


class _Answer(Exception):
    """Ends a request."""

    def __init__(self, status: int, body=None, headers: dict | None = None):
        self.status, self.body, self.headers = status, body, headers or {}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    # (method, pattern of the path, name of the function that answers); a model's id is its groups 1.
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(.+?)/preupload/(.+)", "preupload"),
        ("POST", r"/(.+?)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(\w+)", "lfs_put"),
        ("POST", r"/lfs/(\w+)/verify", "lfs_verify"),
        ("POST", r"/api/models/(.+?)/commit/(.+)", "commit"),
        ("POST", r"/api/models/(.+?)/(tag|branch)/(.+)", "add_ref"),
        ("DELETE", r"/api/models/(.+?)/(tag|branch)/(.+)", "delete_ref"),
        ("GET", r"/api/models/(.+?)/refs", "refs"),
        ("GET", r"/api/models/(.+?)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", "info"),
        ("HEAD", r"/(.+?)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/(.+?)/resolve/([^/]+)/(.+)", "resolve"),
    ]

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        length = int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            fault = next(
                (f for f in self.hub.faults if re.search(f.pattern, path) and f.method in (None, self.command)), None
            )
            if fault is not None:
                fault.times -= 1
                self.hub.faults = [each for each in self.hub.faults if each.times]
        if fault is not None and fault.status is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(length)
        try:
            if fault is not None:
                raise _Answer(fault.status, {"error": f"fault {fault.status}"}, {"Retry-After": "0"})
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    with self.hub.lock:
                        getattr(self, name)(*match.groups())
            raise _Answer(404, {"error": f"{self.command} {path} is not known"})
        except _Answer as answer:
            self.send(answer)

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def send(self, answer: _Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"} | answer.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if write and not authorized:
            raise _Answer(401, {"error": "Invalid credentials"})
        if repository is None or (repository.private and not authorized):
            raise _Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repository

    def revision(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            message = {"error": f"Invalid rev id: {revision}"}
            raise _Answer(404, message, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def whoami(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Answer(401, {"error": "Invalid credentials"})
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        raise _Answer(200, {"type": "user", "name": "user", "orgs": [{"name": "org"}], "auth": auth})

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Answer(401, {"error": "Invalid credentials"})
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            raise _Answer(409, {"error": "You already created this model repo"} | url)
        private = asked.get("private") or asked.get("visibility") == "private"
        repository = self.hub.repositories[repo_id] = Repository(private=bool(private))
        self.hub.blobs[hashlib.sha256(b"").hexdigest()] = b""
        repository.commit("main", {".gitattributes": hashlib.sha256(b"").hexdigest()}, "initial commit")
        raise _Answer(200, url)

    def validate(self):
        content = json.loads(self.body)["content"]
        raise _Answer(200, {"errors": [{"message": problem} for problem in problems_of(content)], "warnings": []})

    def preupload(self, repo_id: str, revision: str):
        repository = self.repository(repo_id, write=True)
        files = repository.commits[self.revision(repository, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] >= LFS_FROM or file["path"].endswith((".safetensors", ".bin"))
            sha = files.get(file["path"])
            oid = None if sha is None else (sha if sha in self.hub.lfs else blob_id(self.hub.blobs[sha]))
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise _Answer(200, {"files": answers})

    def lfs_batch(self, repo_id: str):
        self.repository(repo_id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            actions = {name: {"href": f"{self.hub.url}/lfs/{asked['oid']}{end}"} for name, end in
                       (("upload", ""), ("verify", "/verify"))}  # fmt: skip
            objects.append(asked | ({} if asked["oid"] in self.hub.blobs else {"actions": actions}))
        raise _Answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(422, {"error": "the content is not what its hash says"})
        self.hub.blobs[oid] = self.body
        self.hub.lfs.add(oid)
        raise _Answer(200, {})

    def lfs_verify(self, oid: str):
        stored = self.hub.blobs.get(oid)
        if stored is None or len(stored) != json.loads(self.body)["size"]:
            raise _Answer(422, {"error": "not stored"})
        raise _Answer(200, {})

    def commit(self, repo_id: str, branch: str):
        repository = self.repository(repo_id, write=True)
        if branch not in repository.branches:
            raise _Answer(404, {"error": f"Invalid rev id: {branch}"}, {"X-Error-Code": "RevisionNotFound"})
        lines = [json.loads(line) for line in self.body.decode().splitlines() if line]
        head, files = repository.branches[branch], dict(repository.commits[repository.branches[branch]])
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, head):
            raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = b64decode(value["content"]) if value["encoding"] == "base64" else value["content"].encode()
                sha = hashlib.sha256(content).hexdigest()
                self.hub.blobs[sha] = content
                files[value["path"]] = sha
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = repository.commit(branch, files, header["summary"])
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        raise _Answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def add_ref(self, repo_id: str, kind: str, name: str):
        repository, asked = self.repository(repo_id, write=True), json.loads(self.body or b"{}")
        refs = repository.tags if kind == "tag" else repository.branches
        name, start = (asked["tag"], name) if kind == "tag" else (name, asked.get("startingPoint") or "main")
        if name in refs:
            raise _Answer(409, {"error": f"{kind} {name} exists"})
        refs[name] = self.revision(repository, start)
        raise _Answer(200, {})

    def delete_ref(self, repo_id: str, kind: str, name: str):
        repository = self.repository(repo_id, write=True)
        refs = repository.tags if kind == "tag" else repository.branches
        if refs.pop(name, None) is None:
            raise _Answer(404, {"error": f"no {kind} {name}"}, {"X-Error-Code": "RevisionNotFound"})
        raise _Answer(200, {})

    def refs(self, repo_id: str):
        repository = self.repository(repo_id)

        def listed(kind: str, refs: dict[str, str]) -> list[dict]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in refs.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        raise _Answer(200, {"branches": branches, "converts": [], "tags": tags})

    def info(self, repo_id: str, revision: str | None):
        repository = self.repository(repo_id)
        commit = self.revision(repository, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        about = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
        raise _Answer(200, about | {"private": repository.private, "downloads": 0, "likes": 0, "author": "user"})

    def entries(self, repository: Repository, revision: str) -> list[dict]:
        entries = []
        for path, sha in repository.commits[self.revision(repository, revision)].items():
            content = self.hub.blobs[sha]
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            lfs = {"oid": sha, "size": len(content), "pointerSize": 134}
            entries.append(entry | ({"lfs": lfs} if sha in self.hub.lfs else {}))
        return entries

    def tree(self, repo_id: str, revision: str, folder: str | None):
        entries = self.entries(self.repository(repo_id), revision)
        raise _Answer(200, [entry for entry in entries if entry["path"].startswith(folder or "")])

    def resolve(self, repo_id: str, revision: str, path: str):
        repository = self.repository(repo_id)
        commit = self.revision(repository, revision)
        sha = repository.commits[commit].get(path)
        if sha is None:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            raise _Answer(404, {"error": "Entry not found"}, missing)
        content = self.hub.blobs[sha]
        etag = sha if sha in self.hub.lfs else blob_id(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        raise _Answer(200, content, headers)


def blob_id(content: bytes) -> str:
    """As git numbers a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def problems_of(card: str) -> list[str]:
    """What the Hub's documentation asks of a model card's front matter (huggingface.co/docs/hub/model-cards)."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if not match:
        return ["there is no front matter"]
    data, problems = yaml.safe_load(match[1]), []
    if not re.fullmatch(r"[a-z0-9.\-]+", str(data.get("license", "other"))):
        problems.append(f'"license" is {data["license"]!r}')
    if data.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        problems.append(f'"base_model_relation" must be one of adapter, finetune, merge, quantized, '
                        f'not {data["base_model_relation"]!r}')  # fmt: skip
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", base):
            problems.append(f'"base_model" {base!r} is not a model id')
    for name in ("tags", "datasets", "language"):
        if not isinstance(data.get(name, []), (list, str)):
            problems.append(f'"{name}" must be a list')
    for entry in data.get("model-index", []):
        if not isinstance(entry.get("name"), str) or not isinstance(entry.get("results"), list):
            problems.append('"model-index" needs a name and results')
        for result in entry.get("results", []):
            if "type" not in result.get("task", {}):
                problems.append('"task.type" is missing')
            if not {"type", "name"} <= result.get("dataset", {}).keys():
                problems.append('"dataset.type" or "dataset.name" is missing')
            if not all({"type", "value"} <= metric.keys() for metric in result.get("metrics", [{}])):
                problems.append('"metrics" need a type and a value')
    return problems
