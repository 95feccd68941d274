"""Output folder of a command: all files that it writes, resumes from and removes are there.

`manifest.json` says what the folder is: under `run`, the command, its settings, whether it has finished, and every
file that it left. A folder that holds other files is refused, and only listed files are ever removed.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hub_cards.records import EVALUATION, MANIFEST, METRICS, write_json
from modeling_adala.errors import CheckpointError, UsageError

from .checkpoints import is_sealed, list_checkpoints, remove_checkpoints, remove_files, writing

CHECKPOINTS = "checkpoints"
LOGS, EVENTS = "runs", "events.out.tfevents.*"  # of TensorBoard
LOCK, STAGING = ".lock", ".writing"
_OWN_FILES = (MANIFEST, METRICS, EVALUATION, CHECKPOINTS, LOGS, LOCK, STAGING, "README.md")

# temporary names of `whole_file`, and what file managers and network file systems leave in any folder
_UNMINDED = re.compile(r"\..+\.writing|\.DS_Store|Thumbs\.db|desktop\.ini|lost\+found|\.nfs.*")
# a run that was killed may go on for longer
_MAY_GROW = ("max_steps", "num_train_epochs")


class OutputFolder:
    """Folder that belongs to one command with one group of settings.

    Making one checks all that can be known and writes nothing; `claim` then takes the folder.

    Args:
        path (`str` or `Path`): The folder; it may be missing, empty, or left by an earlier call with these settings. A
            link to a folder is followed.
        command (`str`): What writes into it, such as `"align"`.
        settings (`dict`): All that decides the result, as plain JSON values.
        inputs (`Iterable[str]`, *optional*): Teacher, model and data; names that are not a local path are ignored.
        files (`Iterable[str]`, *optional*): Names that the command may leave, on top of those in the manifest.
        stages (`Iterable[str]`, *optional*): Folders in it that have a manifest of their own.
        checkpoints (`Path`, *optional*): Where checkpoints to resume from are kept until the command has finished.
            Default: `checkpoints` in the folder.

    Raises:
        UsageError: If the path cannot be a folder, holds other files or another run, or is, contains or lies in one of
            `inputs`.
        CheckpointError: If the folder's own manifest cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        command: str,
        settings: Mapping[str, Any],
        inputs: Iterable[Any] = (),
        files: Iterable[str] = (),
        stages: Iterable[str] = (),
        checkpoints: Path | None = None,
    ):
        self.path, self.command = Path(path), command
        self.settings = json.loads(json.dumps(settings, default=str))  # as the manifest gives them back
        self.stages = tuple(stages)
        self.files = {*_OWN_FILES, *files, *self.stages}
        self.checkpoints = self.path / CHECKPOINTS if checkpoints is None else checkpoints
        self._check_place(os.fspath(path), inputs)
        self._check_content()

    # --- what is there -----------------------------------------------------------------------------------------------

    @property
    def record(self) -> dict[str, Any]:
        """Record of the folder in its manifest; empty where there is none."""
        return read_record(self.path)

    @property
    def finished(self) -> bool:
        """Return whether the command has finished here before."""
        return is_finished(self.path)

    def foreign(self) -> list[str]:
        """Return the names in the folder that no command of ours has left there."""
        if not self.path.is_dir():
            return []
        found = foreign_files(self.path, self.files)
        if not self.record:
            return found
        for stage in self.stages:
            found += [f"{stage}/{name}" for name in foreign_files(self.path / stage, _OWN_FILES)]
        work = self.path / CHECKPOINTS
        for folder in [work / stage for stage in self.stages] or [work]:
            found += _foreign_checkpoints(folder, self.path)
        return found

    def _check_place(self, text: str, inputs: Iterable[Any]) -> None:
        if not text.strip() or "\0" in text:
            raise UsageError(f"output_dir={text!r} is not a folder name; pass the path of a folder to write.")
        try:
            place = Path(os.path.realpath(self.path))
            if place.exists() and not place.is_dir():
                raise UsageError(f"output_dir={text!r} is a file; pass the path of a folder.")
            parent = next(folder for folder in (place, *place.parents) if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise UsageError(f"output_dir={text!r} cannot be written, because of {str(parent)!r}; pass another.")
        except OSError as error:
            raise UsageError(f"output_dir={_shorten(text)!r} cannot be a folder: {error.strerror}.") from error
        for source in inputs:
            if not isinstance(source, str | os.PathLike) or not _exists(source):
                continue
            other = Path(os.path.realpath(Path(source).expanduser()))
            if place == other or place.is_relative_to(other) or other.is_relative_to(place):
                where = "is" if place == other else "lies in" if place.is_relative_to(other) else "contains"
                raise UsageError(
                    f"output_dir={text!r} {where} {os.fspath(source)!r}, which is read; pass another folder."
                )

    def _check_content(self) -> None:
        foreign = self.foreign()
        if foreign:
            others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise UsageError(
                f"output_dir={str(self.path)!r} holds {foreign[0]!r}{others}, which this command has not written;"
                " pass an empty or new folder, or move them away."
            )
        record = self.record
        if not record:
            return
        if record.get("command") != self.command:
            raise UsageError(
                f"output_dir={str(self.path)!r} holds a run of {record.get('command')!r}, not {self.command!r}; pass"
                " another folder."
            )
        self.check_settings(record.get("settings", {}), self.settings)

    def check_settings(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Raise `UsageError` for settings that differ. A run that has not finished may become longer."""
        finished = self.finished
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        if not finished:
            changed = [name for name in changed if not (name in _MAY_GROW and _grows(found.get(name), wanted[name]))]
        if changed:
            name = changed[0]
            raise UsageError(
                f"output_dir={str(self.path)!r} holds a {'finished ' if finished else ''}run with"
                f" {name}={found.get(name)!r}, not {wanted[name]!r}; pass another output_dir, or remove that one"
                " to start again."
            )

    # --- taking it ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, main: bool = True, **found: Any) -> Iterator[None]:
        """Take the folder for this process, and record in it what is about to run.

        A stage that fails before its first checkpoint leaves the folder as it was.

        Args:
            main (`bool`, *optional*, defaults to `True`): Whether this is the process that writes.
            found: Further settings that are only known now, such as `data_fingerprint`.

        Raises:
            UsageError: If another process works here, or see the class.
            CheckpointError: If the folder cannot be written.
        """
        self.settings |= json.loads(json.dumps(found, default=str))
        if not main:
            yield
            return
        place = Path(os.path.realpath(self.path))
        created = [folder for folder in (place, *place.parents) if not folder.exists()]
        with self._locked():
            self._check_content()  # another process may have come before
            fresh = not self.record
            if not self.finished or self.record["settings"] != self.settings:
                self.write_record(status="running")
            try:
                yield
            except BaseException:
                if fresh and not self.stages and not any(map(is_sealed, list_checkpoints(self.checkpoints))):
                    remove_checkpoints(self.checkpoints)
                    remove_folder(self.path)
                    if not created:
                        place.mkdir(exist_ok=True)
                    for folder in created[1:]:
                        with contextlib.suppress(OSError):
                            folder.rmdir()
                raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self.path / LOCK, blocking=False)
        with writing(self.path, cleanup=self.path / STAGING):
            try:
                Path(os.path.realpath(self.path)).mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
                raise UsageError(
                    f"output_dir={str(self.path)!r} cannot be created ({error.strerror}); pass another folder."
                ) from error
            except Timeout as error:
                raise UsageError(
                    f"output_dir={str(self.path)!r} is in use by another process; wait for it, or pass another folder."
                ) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()  # before its release: who waits for it then sees that it is gone
            lock.release()

    def write_record(self, status: str, files: Iterable[str] = (), **facts: Any) -> None:
        """Write `manifest.json`: `facts`, and the record of this folder."""
        known = read_manifest_file(self.path) | facts
        files = sorted({*self.record.get("files", []), *files})
        known["run"] = {"command": self.command, "status": status, "settings": self.settings, "files": files}
        write_json(self.path / MANIFEST, known)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a folder to fill, whose files then move into this one.

        They count once `manifest.json` lists them and says that the command has finished.

        Raises:
            CheckpointError: See `writing`.
        """
        staging = self.path / STAGING
        remove_files(staging, _files_below(staging))
        with writing(self.path, cleanup=staging):
            staging.mkdir(parents=True, exist_ok=True)
            yield staging
            facts = read_manifest_file(staging)
            (staging / MANIFEST).unlink(missing_ok=True)
            names = sorted(_files_below(staging), key=lambda name: (name == "config.json", name))
            self.write_record("running", names)  # a kill while they move leaves none that is not listed
            for name in names:  # the configuration last: without it nothing opens the folder
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / name, self.path / name)
            remove_files(staging, set(names))
            self.write_record("finished", **facts)
        remove_checkpoints(self.checkpoints)


def remove_folder(path: Path) -> None:
    """Remove the files of a folder that its manifest lists, and the folder if nothing else is in it."""
    names = set(read_record(path).get("files", []))
    staging = path / STAGING
    remove_files(staging, _files_below(staging))
    remove_checkpoints(path / CHECKPOINTS)
    names |= {f"{LOGS}/{file.name}" for file in (path / LOGS).glob(EVENTS)}
    remove_files(path, names | {METRICS, EVALUATION, "README.md", LOCK})
    remove_files(path, {MANIFEST})


def foreign_files(path: Path, own: Iterable[str]) -> list[str]:
    """Return the names in a folder that are neither in its manifest nor in `own`; without a manifest, all of them."""
    if not path.is_dir():
        return []
    record = read_record(path)
    known = {Path(name).parts[0] for name in record["files"]} | set(own) if record else {LOCK}
    names = (entry.name for entry in path.iterdir())
    return sorted(name for name in names if name not in known and not _UNMINDED.fullmatch(name))


def is_finished(path: Path) -> bool:
    """Return whether a command has finished in a folder, by its manifest."""
    return read_record(path).get("status") == "finished"


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of a run in the manifest of a folder; empty where there is none."""
    record = read_manifest_file(path).get("run")
    return record if isinstance(record, dict) and isinstance(record.get("files"), list) else {}


def read_manifest_file(path: Path) -> dict[str, Any]:
    """Return the content of `manifest.json` in a folder; empty where there is none.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path / MANIFEST} cannot be read ({str(error).splitlines()[0]}), so that it is unknown what the folder"
            " holds; restore that file, or pass another output_dir."
        ) from error
    return content


def _foreign_checkpoints(folder: Path, root: Path) -> list[str]:
    if not folder.is_dir():
        return []
    known = {path.name for path in list_checkpoints(folder)}
    return [str(path.relative_to(root)) for path in folder.iterdir() if path.name not in known]


def _files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def _grows(found: Any, wanted: Any) -> bool:
    return all(isinstance(value, int | float) and value > 0 for value in (found, wanted)) and wanted > found


def _exists(source: str | os.PathLike) -> bool:
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a null byte, an unknown user
        return False


def _shorten(text: str) -> str:
    return text if len(text) < 80 else f"{text[:60]}...{text[-16:]}"
