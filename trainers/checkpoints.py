"""Directories that appear whole or not at all, and the checkpoints to resume from."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from modeling_adala.errors import CheckpointError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(destination: str | os.PathLike, cleanup: str | os.PathLike) -> Iterator[None]:
    """Turns a failed write into one line and removes what it left behind.

    Raises:
        CheckpointError: naming the destination, the reason and what is still intact.
    """
    try:
        yield
    except Exception as error:
        shutil.rmtree(cleanup, ignore_errors=True)
        Path(cleanup).unlink(missing_ok=True)
        if not _is_io_error(error):
            raise
        full = (isinstance(error, OSError) and error.errno in _DISK_FULL) or "No space left" in str(error)
        remedy = "free some space" if full else "check the path and its permissions"
        reason = "the disk is full" if full else str(error).splitlines()[0]
        raise CheckpointError(
            f"could not write {destination}: {reason}. Nothing half-written was left; earlier checkpoints are intact."
            f" To go on, {remedy} and run the same command again."
        ) from error


@contextlib.contextmanager
def whole_directory(destination: str | os.PathLike) -> Iterator[Path]:
    """Yields a directory to fill, which takes its final name once everything in it is written.

    Raises:
        CheckpointError: see `writing`. The old content of `destination`, if any, is then still in place.
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


def whole_file(destination: str | os.PathLike, text: str) -> None:
    """Writes a text file that is either the old one or the new one, whatever happens.

    Raises:
        CheckpointError: see `writing`.
    """
    destination = Path(destination)
    staging = destination.with_name(f".{destination.name}.writing")
    with writing(destination, cleanup=staging):
        staging.write_text(text)
        os.replace(staging, destination)


def complete_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The `checkpoint-N` folders of a run that were written to the end, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The N of a `checkpoint-N` folder."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def _is_io_error(error: Exception) -> bool:
    # safetensors and torch.save report a failed write as their own exception types
    return isinstance(error, OSError) or "I/O error" in str(error) or "No space left" in str(error)
