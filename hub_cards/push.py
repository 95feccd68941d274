"""Pushes a checkpoint folder to the Hub in one commit: `plan_push` decides, `push` uploads (a Space: push_space.py).

Files are chosen one by one, never the folder as a whole: weights as safetensors, the configuration with the
complete `auto_map`, the image processor, the code that opens the model without this package, the card and its
pictures. Checkpoints of `Trainer`, optimizer states, pickles, local paths and non-finite weights never go up.
"""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

import modeling_adala
from modeling_adala.configuration_adala import shared_name
from modeling_adala.conversion.loading import load_config
from modeling_adala.conversion.stored_weights import INDEX, check_dtypes, nonfinite_tensors, weight_files
from modeling_adala.errors import AdaLAError, CheckpointError, UsageError
from modeling_adala.families import is_adala
from modeling_adala.modeling_adala import models_of

from .card import render_card
from .card_data import AdaLACardData
from .exports import FOLDER as ONNX
from .exports import read_exports
from .upstream import get_relative_import_files, git_hash, sha_fileobj

CARD = "README.md"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")

_LOGIN = re.compile(r"(?<=://)[^/\s]*@")
# `from_pretrained` prefers one file to shards and falls back on pickles, so none of an earlier push may stay behind
_WEIGHTS = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True)
class PlannedFile:
    """One file of the commit.

    Args:
        path (`str`): Its path in the repository.
        change (`str`): `"new"`, `"changed"`, `"same"` or `"deleted"`, against the repository.
        size (`int`): Bytes; of a deleted file, those that are on the Hub.
        source (`Path` or `bytes`, *optional*): Its content; `None` if deleted.
    """

    path: str
    change: str
    size: int
    source: Path | bytes | None = None


@dataclass(frozen=True)
class PushPlan:
    """Files, card and target of a push, made by `plan_push` or `plan_space` and carried out by `push`.

    Args:
        repo_id (`str`): `"name"` or `"organization/name"`.
        revision (`str`): Branch that gets the commit.
        private (`bool`): Make a new repository private.
        files (`list[PlannedFile]`): All files to be there, and those to delete.
        card (`str`): The rendered card.
        exists (`bool`): The repository exists and has content of its own.
        parent_commit (`str`, *optional*): Commit that the files were compared with; `None` for a new
            repository.
        new_branch (`bool`): `revision` has to be created, from `parent_commit`.
        notes (`list[str]`): Notes for the user to read before agreeing.
        repo_type (`str`, *optional*, defaults to `"model"`): `"model"` or `"space"`.
    """

    repo_id: str
    revision: str
    private: bool
    files: list[PlannedFile]
    card: str
    exists: bool = False
    parent_commit: str | None = None
    new_branch: bool = False
    notes: list[str] = field(default_factory=list)
    repo_type: str = "model"

    @property
    def changes(self) -> list[PlannedFile]:
        return [file for file in self.files if file.change != "same"]


def plan_push(
    directory: str | Path,
    repo_id: str,
    *,
    revision: str = "main",
    private: bool = False,
    compare: bool = True,
    with_onnx: Sequence[str | Path] = (),
    api: HfApi | None = None,
) -> PushPlan:
    """Decide what a push uploads, without changing anything.

    The card is built from the recorded facts, and the code files are those of the running package, regardless of the
    folder: neither hand-made figures nor a stranger's code goes up under the user's name.

    Args:
        directory (`str` or `Path`): A checkpoint folder, such as the `3-supervised/` of a run.
        repo_id (`str`): `"name"` or `"organization/name"`.
        revision (`str`, *optional*, defaults to `"main"`): Branch; created if it does not exist.
        private (`bool`, *optional*, defaults to `False`): Make a new repository private.
        compare (`bool`, *optional*, defaults to `True`): Compare with the repository. `False` needs no network and
            takes all files for new.
        with_onnx (`Sequence`, *optional*): Folders that `vit-adala export` wrote from this checkpoint; their graphs go
            into `onnx/`, and into the card.
        api (`HfApi`, *optional*): Endpoint and token. Default: those of the environment.

    Raises:
        UsageError: For a folder that is not an AdaLA checkpoint, a malformed `repo_id`, a `revision` that is a tag, or
            `private` on a public repository, or an export of other weights.
        CheckpointError: For a folder that `check_checkpoint` refuses, without weights, or with weights that are NaN,
            infinite or cast to integers.
        AdaLAError: If the Hub refuses, fails or cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"repo_id={repo_id!r} is not a valid repository name: {error}") from error
    sources, card, notes = _collect(Path(directory), repo_id, with_onnx)
    plan: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "private": private, "card": card, "notes": notes}
    return plan_files(sources, _WEIGHTS.fullmatch, compare, api or HfApi(), **plan)


def plan_files(
    sources: Mapping[str, Path | bytes], replaces: Callable[[str], Any], compare: bool, api: HfApi, **plan: Any
) -> PushPlan:
    """Return the plan that brings files into a repository.

    Args:
        sources (`Mapping[str, Path | bytes]`): Content by path.
        replaces (`Callable`): Returns whether a file of the repository that `sources` lacks is deleted, by its path.
        compare (`bool`), api (`HfApi`): See `plan_push`.
        plan: Fields of `PushPlan` that the repository does not decide.

    Raises:
        UsageError: See `plan_push`.
        AdaLAError: If the Hub refuses, fails or cannot be reached.
    """
    remote: dict[str, RepoFile] = {}
    if compare:
        with _hub_errors(plan["repo_id"], api):
            remote = _compare_with(api, plan)
    files = [_planned(path, source, remote.get(path)) for path, source in sources.items()]
    stale = [entry for path, entry in remote.items() if replaces(path) and path not in sources]
    files += [PlannedFile(entry.path, "deleted", entry.size) for entry in stale]
    left = [path for path in remote if path.startswith(f"{ONNX}/") and path.endswith(".onnx") and path not in sources]
    if left and any(file.change != "same" for file in files if _WEIGHTS.fullmatch(file.path)):
        note = f"{', '.join(left)} on the Hub is of earlier weights and stays; export again, pass --with-onnx"
        plan["notes"].append(note)
    return PushPlan(files=files, exists=bool(remote.keys() - {".gitattributes"}), **plan)


def push(plan: PushPlan, api: HfApi | None = None) -> str:
    """Upload a plan in one commit. If anything fails, the branch stays as it was.

    Args:
        plan (`PushPlan`): From `plan_push`.
        api (`HfApi`, *optional*): Endpoint and token. Default: those of the environment.

    Returns:
        `str`: URL of the commit, or of the branch if nothing has changed.

    Raises:
        AdaLAError: If the Hub refuses, fails or cannot be reached, or the branch has moved since the plan was made.
    """
    api = api or HfApi()
    operations: list[Any] = [
        CommitOperationDelete(file.path)
        if file.source is None
        else CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.source)
        for file in plan.changes
    ]
    with _hub_errors(plan.repo_id, api):
        api.whoami()  # a missing or wrong token looks like a missing repository further on
        repo_id, parent, kind = plan.repo_id, plan.parent_commit, plan.repo_type
        if parent is None:
            sdk = "gradio" if kind == "space" else None
            repo_id = api.create_repo(repo_id, private=plan.private, repo_type=kind, space_sdk=sdk).repo_id
            parent = api.repo_info(repo_id, repo_type=kind).sha
        if plan.new_branch:
            api.create_branch(repo_id, branch=plan.revision, revision=parent, exist_ok=True, repo_type=kind)
        if not operations:
            place = f"spaces/{repo_id}" if kind == "space" else repo_id
            return without_login(f"{api.endpoint}/{place}/tree/{plan.revision}")
        message = f"Upload with vit-adala {modeling_adala.__version__}"
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=plan.revision, parent_commit=parent, repo_type=kind
        )
        return without_login(commit.commit_url)


def without_login(text: str) -> str:
    """Return a text without the user names and passwords in its URLs, such as those of `HF_ENDPOINT`."""
    return _LOGIN.sub("", text)


# --- the folder ------------------------------------------------------------------------------------------------------


def _collect(
    directory: Path, repo_id: str, with_onnx: Sequence[str | Path]
) -> tuple[dict[str, Path | bytes], str, list[str]]:
    """Return the contents by path in the repository, the card, and notes on them."""
    if not (directory / "config.json").is_file():
        below = sorted(path.parent.name for path in directory.glob("*/config.json"))
        remedy = f"one of the folders in it ({', '.join(below)})" if below else "a folder that save_pretrained wrote"
        raise UsageError(f"directory={str(directory)!r} has no config.json; pass {remedy}.")
    config = load_config(str(directory))
    if not is_adala(config):
        raise UsageError(
            f"directory={str(directory)!r} holds a {config.model_type!r}, not an AdaLA model; push it with"
            " `model.push_to_hub`, or convert it first."
        )
    data, notes = AdaLACardData.from_checkpoint(directory, repo_id, config=config), []
    exports = read_exports(with_onnx, directory)
    card = str(render_card(dataclasses.replace(data, exports=exports)))
    if not _is_from_records(directory, data):
        notes.append(f"{directory / CARD} was edited by hand; the card that goes up is built from the records")
    processors: dict[str, Path | bytes] = {
        name: directory / name for name in PROCESSORS if (directory / name).is_file()
    }
    if not processors:
        notes.append(f"{directory} has no {PROCESSORS[0]}: AutoImageProcessor and pipelines will not open this model")
    values = _without_local_paths(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    values["auto_map"] = models_of(config)["Model"].auto_map
    sources: dict[str, Path | bytes] = {CARD: card.encode(), "config.json": _as_json(values)}
    sources |= processors | _code(values["auto_map"]) | _weights(directory)
    sources |= {picture.name: picture for picture in data.pictures if f"({picture.name})" in card}
    sources |= {f"{ONNX}/{path.name}": path for export in exports for path in export.files}
    return sources, card, notes


def _is_from_records(directory: Path, data: AdaLACardData) -> bool:
    """Return whether the card in the folder, which links pictures where they are, is unedited or missing."""
    path = directory / CARD
    own = str(render_card(dataclasses.replace(data, repo_id=None)))
    return not path.is_file() or path.read_text(encoding="utf-8").replace("](../", "](") == own


def _weights(directory: Path) -> dict[str, Path | bytes]:
    files = weight_files(directory)
    if not files:
        raise CheckpointError(
            f"directory={str(directory)!r} has no model.safetensors; save the model as safetensors first."
        )
    check_dtypes(f"directory={str(directory)!r}", files)
    bad = nonfinite_tensors(files)
    if bad:
        raise CheckpointError(
            f"directory={str(directory)!r} holds non-finite weights in {len(bad)} tensors (first: {bad[0]!r}); push an"
            " earlier checkpoint, or train again with a lower learning rate."
        )
    index = [directory / INDEX] if files[0].name != "model.safetensors" else []
    return {path.name: path for path in (*index, *files)}


def _code(names: dict[str, str]) -> dict[str, Path | bytes]:
    package = Path(modeling_adala.__file__).parent
    files = {package / f"{name.partition('.')[0]}.py" for name in names.values()}
    files |= {Path(needed) for file in files for needed in get_relative_import_files(file)}
    return {file.name: file for file in sorted(files)}


def _without_local_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without paths of this machine, regardless of the version or tool that wrote it."""
    values = {name: _without_local_paths(part) if isinstance(part, dict) else part for name, part in values.items()}
    for name in ("_name_or_path", "name_or_path"):
        values.pop(name, None)
    if isinstance(values.get("teacher_name_or_path"), str):
        values["teacher_name_or_path"] = shared_name(values["teacher_name_or_path"])
    return values


def _as_json(values: dict[str, Any]) -> bytes:
    """Return what `PretrainedConfig.to_json_file` writes, so that an unchanged configuration counts as unchanged."""
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


# --- the repository --------------------------------------------------------------------------------------------------


def _compare_with(api: HfApi, plan: dict[str, Any]) -> dict[str, RepoFile]:
    """Return the files of the branch (of `main` if it is new), and note in the plan what is there."""
    repo_id, revision, kind = plan["repo_id"], plan["revision"], plan.get("repo_type", "model")
    try:
        refs = api.list_repo_refs(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        plan["new_branch"] = revision != "main"
        return {}
    branches = {branch.name: branch.target_commit for branch in refs.branches}
    if revision not in branches and revision in {tag.name for tag in refs.tags}:
        raise UsageError(
            f"revision={revision!r} is a tag of {repo_id}, which a push does not move; pass the name of a branch."
        )
    if plan["private"] and not api.repo_info(repo_id, repo_type=kind).private:
        raise UsageError(
            f"private=True, but {repo_id} is public; change that in its settings on the Hub, or push without it."
        )
    plan["new_branch"] = revision not in branches
    plan["parent_commit"] = branches.get(revision, branches["main"])
    entries = api.list_repo_tree(repo_id, revision=plan["parent_commit"], recursive=True, repo_type=kind)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _planned(path: str, source: Path | bytes, remote: RepoFile | None) -> PlannedFile:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    change = "new" if remote is None else "same" if _is_same(source, size, remote) else "changed"
    return PlannedFile(path, change, size, source)


def _is_same(source: Path | bytes, size: int, remote: RepoFile) -> bool:
    if size != remote.size:
        return False
    if remote.lfs is None:
        return git_hash(source if isinstance(source, bytes) else source.read_bytes()) == remote.blob_id
    if isinstance(source, bytes):
        return False  # what we write ourselves is text, which no repository keeps in LFS
    with open(source, "rb") as file:
        return sha_fileobj(file).hex() == remote.lfs.sha256


@contextlib.contextmanager
def _hub_errors(repo_id: str, api: HfApi) -> Iterator[None]:
    """Turn exceptions of the Hub's client into one line with the remedy and without the endpoint's password."""
    # the client logs the URLs of its further attempts
    handlers = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(_hide_login)
    try:
        yield
    except AdaLAError:
        raise
    except Exception as error:
        # a failed LFS upload arrives wrapped in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        message = _explain(cause, repo_id, api)
        if message is None:
            raise
        raise AdaLAError(without_login(message)) from error
    finally:
        for handler in handlers:
            handler.removeFilter(_hide_login)


def _hide_login(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_login(record.getMessage()), None
    return True


def _explain(error: BaseException, repo_id: str, api: HfApi) -> str | None:
    again = "A push arrives whole or not at all; run the same command again"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids the network; unset it to push."
    if isinstance(error, LocalTokenNotFoundError):
        return "no token for the Hub was found; run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or error.response.headers.get("X-Error-Message") or f"status {status}"
        if status == 401:
            return f"{api.endpoint} does not accept the token; run `hf auth login`, or set HF_TOKEN to a valid one."
        if status == 403:
            return f"the token may not write to {repo_id}; use one with write access to that account. Hub: {said}"
        if status in (409, 412):
            return f"{repo_id} has changed since it was looked at, so nothing was pushed; try again. Hub: {said}"
        if status >= 500 or status == 429:
            return f"{api.endpoint} failed with status {status}. {again} later. Hub: {said}"
        if isinstance(error, RevisionNotFoundError):
            return f"{repo_id} has lost the branch meanwhile. Run the same command again to create it. Hub: {said}"
        return f"{api.endpoint} refused with status {status}: {said}"
    if isinstance(error, json.JSONDecodeError):  # a hotel's login page, a proxy
        return f"{api.endpoint} answered with something other than JSON, such as a login page. {again} without it."
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        reason = str(error) or type(error).__name__
        return f"the connection to {api.endpoint} broke: {reason}. {again}."
    return None


__all__ = ["PlannedFile", "PushPlan", "plan_files", "plan_push", "push", "without_login"]
