"""Contents of a checkpoint besides its weights: its `auto_map` and code version, but no local paths.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

import functools
import logging
import os
import re

from transformers import PretrainedConfig

from .upstream import auto_classes_of

ADALA_VERSION = "0.1.0"
"""Version of this code, which checkpoints carry as `adala_version`. Equals `modeling_adala.__version__`."""

logger = logging.getLogger(__name__)


def auto_map(config_class: type[PretrainedConfig]) -> dict[str, str]:
    """`auto_map` of a family: `AutoConfig` and every Auto class that a model of this family is registered for.

    Transformers names only the class that is being saved, so that a pushed classifier would not open with `AutoModel`.

    Args:
        config_class (`type[PretrainedConfig]`): The configuration class that the models are registered under.

    Returns:
        `dict[str, str]`: `{"AutoModel": "file.Class", ...}`.
    """
    classes = {"AutoConfig": config_class} | auto_classes_of(config_class)
    return {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in classes.items()}


@functools.cache
def warn_if_newer(version: str | None) -> None:
    """Warns, once per version, about a checkpoint of a release whose options this code may not know.

    Older checkpoints are read without a word, and so are those of the same minor release.
    """
    if version is not None and _minor_release(version) > _minor_release(ADALA_VERSION):
        logger.warning(
            "this checkpoint was written by vit-adala %s, and this is %s: options that it does not know are ignored,"
            " and outputs may differ. Update vit-adala, or load with trust_remote_code=True without importing"
            " modeling_adala.",
            version,
            ADALA_VERSION,
        )


def shared_name(name_or_path: str | None) -> str | None:
    """Return the name of a model as it may be read by anyone: a Hub id as it is, of a local path its last part.

    A configuration goes wherever its weights go, by `push_to_hub`, by `Trainer`, or by an upload of the folder;
    parent folders may be private.
    """
    if not name_or_path:
        return name_or_path
    cached = re.search(r"models--([\w.-]+)[/\\]snapshots[/\\]", name_or_path)
    if cached:  # a folder of the Hub's cache
        return cached[1].replace("--", "/")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path) and not os.path.exists(name_or_path):
        return name_or_path
    return re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1] or None


def _minor_release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
