"""Files that appear whole or not at all, and checkpoints that are intact or not resumed from."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from hub_cards.records import write_text
from modeling_adala.errors import CheckpointError

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what a Trainer writes into a checkpoint
_TRAINERS_FILES = (
    r"(config|generation_config|adapter_config|trainer_state|(adapter_)?model\.safetensors\.index)\.json",
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors",
    r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|training_args\.bin|README\.md|\w+\.py",
)
# safetensors and torch.save report a failed write as their own exception types
_IO_ERRORS = ("I/O error", "No space left", "inline_container.cc", "PytorchStreamWriter failed")


@contextlib.contextmanager
def writing(destination: str | os.PathLike, cleanup: str | os.PathLike) -> Iterator[None]:
    """Turn a failed write into one line and remove the half-written file or folder.

    Raises:
        CheckpointError: Naming the destination, the reason and what is still intact.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(cleanup, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path(cleanup).unlink(missing_ok=True)
        if not _is_io_error(error):
            raise
        full = (isinstance(error, OSError) and error.errno in _DISK_FULL) or _mentions(error, _IO_ERRORS[1:])
        remedy = "free some space" if full else "check the path and its permissions"
        reason = "the disk is full" if full else str(error).splitlines()[0]
        raise CheckpointError(
            f"could not write {destination}: {reason}. Nothing half-written was left; earlier checkpoints are intact."
            f" To resume, {remedy} and run the same command again."
        ) from error


@contextlib.contextmanager
def whole_directory(destination: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to fill, which takes its final name once everything in it is written.

    Raises:
        CheckpointError: See `writing`. The old content of `destination`, if any, is then still in place.
    """
    destination = Path(destination)
    staging = destination.with_name(f".{destination.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    with writing(destination, cleanup=staging):
        staging.mkdir(parents=True)
        yield staging
        if destination.exists():
            shutil.rmtree(destination)
        os.replace(staging, destination)


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Return the `checkpoint-<step>` folders of a run, oldest first, intact or not."""
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a `checkpoint-<step>` folder."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def seal(checkpoint: str | os.PathLike) -> None:
    """Write the SHA-256 of every file of a finished checkpoint into it. Comes last, so that a kill leaves none."""
    checkpoint = Path(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    sums = {path.relative_to(checkpoint).as_posix(): _sha256(path) for path in files}
    write_text(checkpoint / CHECKSUMS, json.dumps(sums, indent=1) + "\n")


def unseal(checkpoint: str | os.PathLike) -> None:
    """Mark a checkpoint as unfinished, before it is written again."""
    (Path(checkpoint) / CHECKSUMS).unlink(missing_ok=True)


def is_sealed(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to the end; `find_damage` tells whether it still is what was written."""
    return (checkpoint / CHECKSUMS).is_file()


def find_damage(checkpoint: str | os.PathLike) -> str | None:
    """Return why a sealed checkpoint is no longer what was written, or `None` if it is intact."""
    checkpoint = Path(checkpoint)
    sums = _read_checksums(checkpoint)
    if not sums:
        return f"{CHECKSUMS} cannot be read"
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} has changed since it was written"
    return None


def intact_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Return the newest checkpoint to resume from, or `None` where none was written to the end.

    A checkpoint whose writing was cut short is skipped; a damaged one too, with a warning.

    Raises:
        CheckpointError: If there are finished checkpoints, but all of them are damaged.
    """
    damaged = []
    for checkpoint in reversed(list_checkpoints(output_dir)):
        if not is_sealed(checkpoint):
            continue
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        damaged.append(checkpoint)
        logger.warning("%s is damaged and not resumed from: %s", checkpoint, damage)
    if damaged:
        raise CheckpointError(
            f"{damaged[0]} is damaged ({find_damage(damaged[0])}), and there is no intact checkpoint before it;"
            f" remove {Path(output_dir)} to start this stage again."
        )
    return None


def remove_checkpoints(output_dir: str | os.PathLike) -> None:
    """Remove the checkpoints in a folder, file by file as their checksums list them, and the folder if it is empty.

    What a kill left unsealed is removed by the names that `Trainer` gives. Files of anyone else stay.
    """
    folder = Path(output_dir)
    for checkpoint in list_checkpoints(folder):
        names = set(_read_checksums(checkpoint)) or {p.name for p in checkpoint.iterdir() if _is_trainers(p)}
        remove_files(checkpoint, {*names, CHECKSUMS, f".{CHECKSUMS}.writing"})
    with contextlib.suppress(OSError):  # not empty, or not there
        folder.rmdir()
        if folder.parent.name == "checkpoints":  # a recipe keeps those of all stages in one folder
            folder.parent.rmdir()


def remove_files(directory: Path, names: set[str]) -> None:
    """Remove these files of a folder, then the folders that are empty."""
    for name in names:
        (directory / name).unlink(missing_ok=True)
    folders = sorted({parent for name in names for parent in (directory / name).parents}, reverse=True)
    for folder in (folder for folder in folders if folder.is_relative_to(directory)):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _is_trainers(path: Path) -> bool:
    return path.is_file() and any(re.fullmatch(pattern, path.name) for pattern in _TRAINERS_FILES)


def _read_checksums(checkpoint: Path) -> dict[str, str]:
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return {}
    return sums if isinstance(sums, dict) else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_io_error(error: Exception) -> bool:
    return isinstance(error, OSError) or _mentions(error, _IO_ERRORS)


def _mentions(error: Exception, texts: tuple[str, ...]) -> bool:
    return any(text in str(error) for text in texts)
