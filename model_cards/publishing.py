"""Speculators to the Hub, in versions: what is sent, in one commit, and the tag on that very commit."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from packaging.version import InvalidVersion, Version

from ..drafters import DRAFTERS
from .provenance_file import FILE, SHARDS, WEIGHTS, is_about, read_provenance, sha256_of, weights_in
from .repository import INDEX, collect


# What an earlier version may have left that a new one does not have; other people's files stay.
_OURS = (WEIGHTS, SHARDS, INDEX, "acceptance.json", "latency.json", FILE)


@dataclass(frozen=True)
class Publication:
    """
    url: of the commit.
    commit: what the version is tagged on; None of a dry run.
    files: {path in the repository: bytes}, all that the version holds.
    left_out: names in the folder that were not sent.
    is_new: whether anything was sent.
    deleted: what an earlier version had, and this one has not.
    """

    url: str
    commit: str | None
    files: dict[str, int]
    left_out: list[str]
    is_new: bool = False
    deleted: tuple[str, ...] = ()


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
        repo_id: ORG/NAME; made where it is not there.
        version: as "1.0.0", which becomes the tag "v1.0.0"; None: no tag.
        base_model, base_model_revision: Hub id and commit, where the config names a folder or another.
        acceptance, latency: files of evaluate_acceptance.py and benchmark_latency.py, for the card.
        license: as the Hub writes it ("apache-2.0"), for the card.
        branch: made from main where it is not there.
        private: of a new repository.
        message: of the commit and the tag.
        force: moves the tag of a version that is there.
        dry_run: sends nothing, and asks the Hub nothing.
        token: of the Hub; by default that of `hf auth login`.

    Raises:
        ValueError: for a folder that is no speculator or would leak a secret, figures or a provenance of another
            speculator, a base model that is a folder or has no such commit, a repository of another model, a version
            that is there with other content, or one that is none.
        HfHubHTTPError, OSError, RuntimeError: where the Hub can't be reached or refuses. The same call goes on.
    """
    tag = tag_of(version) if version is not None else None
    check_repo_id(repo_id)
    contents, left_out = collect(folder, repo_id, base_model, base_model_revision, acceptance, latency, license)
    files = {path: _size(content) for path, content in contents.items()}
    if dry_run:
        return Publication(f"https://huggingface.co/{repo_id}", None, files, left_out)
    api = HfApi(token=token)
    check_base_is_there(api, repo_id, json.loads(contents["config.json"]))
    api.create_repo(repo_id, private=private, exist_ok=True)
    check_repository(api, repo_id, api.repo_info(repo_id), private)
    refs = api.list_repo_refs(repo_id)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if branch not in {ref.name for ref in refs.branches}:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    head = api.repo_info(repo_id, revision=branch)

    def published(commit: str, is_new: bool = False, deleted: tuple[str, ...] = ()) -> Publication:
        return Publication(f"{api.endpoint}/{repo_id}/tree/{commit}", commit, files, left_out, is_new, deleted)

    if tag in tags and not force:
        if not any(_differences(api, repo_id, tags[tag], contents)):
            return published(tags[tag])
        raise ValueError(
            f"{repo_id} has a version {tag} with other content. Take a new version, or move this one (`force=True`, "
            "--force): who has pinned it will get something else."
        )
    differ, stale = _differences(api, repo_id, head.sha, contents)
    older = tags.values() if tag is not None else []  # without a version it is the branch that is to have it
    same = (each for each in dict.fromkeys(older) if not any(_differences(api, repo_id, each, contents)))
    commit = next(same, None) if differ or stale else head.sha
    if commit is not None:
        done = published(commit)
    else:
        title = message or f"Speculator {tag or ''}".strip()
        done = published(_commit(api, repo_id, contents, stale, branch, head.sha, title), True, tuple(stale))
    if tag is not None and tags.get(tag) != done.commit:
        _tag(api, repo_id, tag, done.commit, tags.get(tag), message)
    return done


def publish_model(speculator, repo_id: str, version: str | None = None, **options) -> Publication:
    """`publish` of a speculator in memory, with the provenance of where it was loaded from while it is the same.

    Args:
        options: of `publish`.
    """
    with TemporaryDirectory() as folder:
        speculator.save_pretrained(folder)
        source = speculator.name_or_path or None
        provenance = read_provenance(source, speculator.loaded_revision, options.get("token"))
        if provenance is not None and provenance.get("weights") and is_about(provenance, weights_in(folder)):
            (Path(folder) / FILE).write_text(json.dumps(provenance))
        elif provenance is not None:
            warnings.warn(
                f"These weights are not, to the last bit, those that {FILE} of {source} is known to be about: what it "
                "tells of their training is not sent.",
                stacklevel=3,
            )
        return publish(folder, repo_id, version, **options)


def check_repo_id(repo_id: str) -> None:
    """Raises a ValueError for what is no name of a repository with its owner: the card has to name it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"Say whose repository it is to be: ORG/{repo_id}.")


def check_base_is_there(api: HfApi, repo_id: str, config: dict) -> None:
    """Looks for the base model that a config names: a warning where the Hub has none of that name, yet.

    Raises:
        ValueError: where it has no such commit, or the base model is the repository itself.
    """
    name, revision = config["base_model_name_or_path"], config.get("base_model_revision")
    if name == repo_id:
        raise ValueError(f"{repo_id} is the base model. Take another repository for its speculator.")
    try:
        api.model_info(name, revision=revision)
    except GatedRepoError:  # it is there
        pass
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{name}, the base model, has no commit {revision}. Say which it is: `base_model_revision`."
        ) from error
    except RepositoryNotFoundError:
        warnings.warn(
            f"The Hub has no model {name} that you can see. Nobody can use its speculator without it: push it, too, "
            "or say where it is (`base_model`).",
            stacklevel=3,
        )


def check_repository(api: HfApi, repo_id: str, head, private: bool | None) -> None:
    """Raises a ValueError where a repository is not what it is taken for."""
    if private and head.private is False:
        raise ValueError(f"{repo_id} is public already. Make it private in its settings, or drop `private`.")
    names = {file.rfilename for file in head.siblings or []}
    if "config.json" in names:
        config = json.loads(Path(api.hf_hub_download(repo_id, "config.json", revision=head.sha)).read_text())
        if config.get("model_type") not in {each.model_type for each in DRAFTERS}:
            raise ValueError(
                f"{repo_id} holds a model of type {config.get('model_type')!r}, which would be overwritten. Take "
                "another repository."
            )
    elif others := {name for name in names if not fnmatchcase(name, "LICENSE*")} - {".gitattributes", "README.md"}:
        raise ValueError(
            f"{repo_id} holds {', '.join(sorted(others)[:5])}, and no speculator. Take another repository."
        )


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


def _commit(api: HfApi, repo_id: str, contents: dict, stale: list[str], branch: str, head: str, message: str) -> str:
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    operations += [CommitOperationDelete(path) for path in stale]
    try:
        done = api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=head)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 412:
            raise ValueError(f"{repo_id} was changed by somebody else meanwhile: look, and push again.") from error
        raise
    return done.oid


def _tag(api: HfApi, repo_id: str, tag: str, commit: str, before: str | None, message: str | None) -> None:
    """Tags a commit; a tag that can't be moved stays where it was."""
    if before is not None:
        api.delete_tag(repo_id, tag=tag)
    try:
        api.create_tag(repo_id, tag=tag, revision=commit, tag_message=message)
    except Exception:
        if before is not None:
            api.create_tag(repo_id, tag=tag, revision=before)
        raise


def _differences(api: HfApi, repo_id: str, revision: str, contents: dict) -> tuple[list[str], list[str]]:
    """What a revision has otherwise or not at all, and what of ours it has that it should not have."""
    entries = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    there = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
    stale = [path for path in there if path not in contents and any(fnmatchcase(path, kind) for kind in _OURS)]
    stale = [path for path in stale if "/" not in path]
    return [path for path, content in contents.items() if not _same(there.get(path), content)], stale


def _same(entry, content: bytes | Path) -> bool:
    if entry is None or entry.size != _size(content):
        return False
    if entry.lfs is not None:
        is_file = isinstance(content, Path)
        sha = sha256_of(content) if is_file else hashlib.sha256(content).hexdigest()
        return sha == entry.lfs.sha256
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == entry.blob_id


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
