"""Speculators to the Hub, in versions: what is sent, in one commit, and the tag on that very commit."""

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from packaging.version import InvalidVersion, Version

from .repository import OURS, collect


@dataclass(frozen=True)
class Publication:
    """
    url: of the commit.
    commit: what the version is tagged on; None of a dry run.
    files: {path in the repository: bytes}, all that the version holds.
    left_out: names in the folder that were not sent.
    is_new: whether anything was sent.
    """

    url: str
    commit: str | None
    files: dict[str, int]
    left_out: list[str]
    is_new: bool


def publish(
    folder: str | Path,
    repo_id: str,
    version: str | None = None,
    *,
    base_model: str | None = None,
    base_model_revision: str | None = None,
    acceptance: str | Path | None = None,
    latency: str | Path | None = None,
    license: str | None = None,
    branch: str = "main",
    private: bool | None = None,
    message: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Publication:
    """Sends a speculator to the Hub, with its card and code, and tags the commit with its version.

    Can be repeated after an interruption. What is there already is not sent again: a new version of the same content
    is a tag on the same commit.

    Args:
        folder: of the trained speculator.
        version: as "1.0.0", which becomes the tag "v1.0.0"; None: no tag.
        base_model, base_model_revision: Hub id and commit, where the config names a folder or another.
        acceptance, latency: files of evaluate_acceptance.py and benchmark_latency.py, for the card.
        branch: made from main where it is not there.
        force: moves the tag of a version that is there.
        dry_run: sends nothing, and asks the Hub nothing.

    Raises:
        ValueError: for a folder that is no speculator or would leak a secret, figures of another speculator, a version
            that is there with other content, or one that is none.
    """
    tag = tag_of(version) if version is not None else None
    contents, left_out = collect(folder, repo_id, base_model, base_model_revision, acceptance, latency, license)
    files = {path: _size(content) for path, content in contents.items()}
    if dry_run:
        return Publication(f"https://huggingface.co/{repo_id}", None, files, left_out, False)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    refs = api.list_repo_refs(repo_id)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if branch not in {ref.name for ref in refs.branches}:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    head = api.repo_info(repo_id, revision=branch).sha

    if tag in tags and not force:
        if not _differences(api, repo_id, tags[tag], contents):
            return Publication(_url(api, repo_id, tags[tag]), tags[tag], files, left_out, False)
        raise ValueError(
            f"{repo_id} has a version {tag} with other content. Take a new version, or move this one (`force=True`, "
            "--force): who has pinned it will get something else."
        )
    known = [head] if tag is None else dict.fromkeys([head, *tags.values()])
    commit = next((each for each in known if not _differences(api, repo_id, each, contents)), None)
    is_new = commit is None
    if is_new:
        commit = _commit(api, repo_id, contents, branch, head, message or f"Speculator {tag or ''}".strip())
    if tag is not None and tags.get(tag) != commit:
        if tag in tags:
            api.delete_tag(repo_id, tag=tag)
        api.create_tag(repo_id, tag=tag, revision=commit, tag_message=message)
    return Publication(_url(api, repo_id, commit), commit, files, left_out, is_new)


def list_versions(repo_id: str, token: str | None = None) -> dict[str, str]:
    """{version: commit} of a repository, the newest last."""
    tags = {ref.name: ref.target_commit for ref in HfApi(token=token).list_repo_refs(repo_id).tags}
    return {tag: tags[tag] for tag in sorted(filter(_version, tags), key=_version)}


def tag_of(version: str) -> str:
    """Raises a ValueError for what is no version."""
    parsed = _version(version)
    if parsed is None or len(parsed.release) != 3:
        raise ValueError(f"A version is three numbers, as 1.0.0 or 1.1.0rc1, not {version!r}.")
    return f"v{parsed}"


def _version(name: str) -> Version | None:
    try:
        return Version(name)
    except InvalidVersion:
        return None


def _commit(api: HfApi, repo_id: str, contents: dict, branch: str, head: str, message: str) -> str:
    there = api.list_repo_files(repo_id, revision=head)
    stale = [path for path in there if path not in contents and any(fnmatch(path, kind) for kind in OURS)]
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    operations += [CommitOperationDelete(path) for path in stale]
    try:
        done = api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=head)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 412:
            raise ValueError(
                f"{repo_id} was changed by somebody else meanwhile. Look at it, and push again."
            ) from error
        raise
    return done.oid


def _differences(api: HfApi, repo_id: str, revision: str, contents: dict) -> set[str]:
    """Paths whose content at a revision is another."""
    entries = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    there = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
    stale = {path for path in there if path not in contents and any(fnmatch(path, kind) for kind in OURS)}
    return stale | {path for path, content in contents.items() if not _same(there.get(path), content)}


def _same(entry, content: bytes | Path) -> bool:
    if entry is None or entry.size != _size(content):
        return False
    if entry.lfs is not None:
        with open(content, "rb") if isinstance(content, Path) else BytesIO(content) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == entry.blob_id


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _url(api: HfApi, repo_id: str, commit: str) -> str:
    return f"{api.endpoint}/{repo_id}/tree/{commit}"
