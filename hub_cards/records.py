"""Reading what a run left on record beside a checkpoint. A record that cannot be read counts as missing."""

import functools
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id

logger = logging.getLogger(__name__)

# what `save_pretrained` and a stage write; a run's stage folders carry their number in front
_STAGE_FOLDER = re.compile(r"\d+-(?P<stage>.+)")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty, with a warning where the file is there, if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is left out of the card: %s", path, str(error).splitlines()[0])
        return {}
    return mapping(content)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; none if there is no such file."""
    lines = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):  # such as the line that was being written when a process was killed
                continue
            if isinstance(content, dict):
                lines.append(content)
    return lines


def run_directory(directory: Path) -> Path | None:
    """The folder of the run that a stage folder belongs to: its parent, if the manifest there names this stage."""
    directory = directory.absolute()
    found = _STAGE_FOLDER.fullmatch(directory.name)
    if found is None or found["stage"] not in mapping(read_json(directory.parent / "manifest.json").get("stages")):
        return None
    return directory.parent


def read_manifest(directory: Path) -> dict[str, Any]:
    """What is on record of a checkpoint: its own `manifest.json`, and behind it that of its run.

    Returns:
        `dict`: `stages` holds this checkpoint's stage and those before it; no later ones.
    """
    own, run = read_json(directory / "manifest.json"), run_directory(directory)
    if run is None:
        return own
    whole = read_json(run / "manifest.json")
    names = list(whole["stages"])
    names = names[: names.index(directory.absolute().name.partition("-")[2]) + 1]
    stages = {name: whole["stages"][name] for name in names}
    return {**whole, **own, "stages": stages | mapping(own.get("stages"))}


@functools.cache
def find_license(teacher: str | None, revision: str | None = None, *, download: bool = False) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the teacher's card states them; empty if that is not known.

    Args:
        teacher (`str`, *optional*): Folder or Hub id.
        revision (`str`, *optional*): Commit of the Hub id; without it the teacher is taken for a folder.
        download (`bool`, *optional*, defaults to `False`): Whether to ask the Hub for a card that is not in the cache.
    """
    try:
        if revision is not None and hub_id(teacher):
            card = Path(hf_hub_download(str(teacher), "README.md", revision=revision, local_files_only=not download))
        else:
            card = Path(teacher or "") / "README.md"
        metadata = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError) as error:  # no such card, no network, no valid YAML
        logger.info("license of %s: not known (%s)", teacher, str(error).splitlines()[0])
        return {}
    return license_of(metadata)


def license_of(record: Any) -> dict[str, str]:
    """The license fields of a card's metadata."""
    fields = {name: one_line(mapping(record).get(name)) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in fields.items() if value}


def hub_id(name: Any) -> str | None:
    """The name if the Hub would take it as a repo id, else `None`."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return None
    return name


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """The value if it is a finite number, else `None`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def one_line(value: Any) -> str | None:
    """The value on one line and without control characters if it is a text, else `None`."""
    if not isinstance(value, str):
        return None
    return "".join(character for character in " ".join(value.split()) if character.isprintable()) or None
