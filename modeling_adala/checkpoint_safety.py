"""Whether a checkpoint folder is safe to open, from its names, its config.json and its safetensors headers alone.

No model is built and no weight is read: a folder takes milliseconds. Nothing is ever unpickled, here or later, since
every loader of ours asks for safetensors.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PretrainedConfig

from .configuration_adala import pair
from .errors import CheckpointError
from .families import FAMILIES

MAX_LAYERS = 1_000
MAX_INTEGER = 1_000_000
MAX_CONFIG_BYTES = 2**24  # ImageNet-22k's names, twice over, are a tenth of that

_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_LAYERS = {"num_hidden_layers", "num_layers", "depth"}
_AT_LEAST_ONE = _LAYERS | {
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "num_patches",
    "patch_size",
    "encoder_stride",
    "mlp_ratio",
}


def check_checkpoint(directory: str | os.PathLike) -> None:
    """Refuses a checkpoint folder that should not be opened. Hub ids are not for here: the Hub's client checks those.

    A folder inside the Hub's cache, whose files are links to the cache's own blobs, passes.

    Args:
        directory (`str` or `os.PathLike`): The folder, with a config.json. Weights may be missing.

    Raises:
        CheckpointError: for a link that leads out of the folder, weights that are pickled or outside of it, a
            safetensors file that is truncated or corrupt, and a config.json that is no configuration: wrong types,
            sizes below 1 or beyond any model, or more parameters than the weights could ever fill.
    """
    directory = Path(directory)
    _check_links(directory)
    values = _read_config(directory)
    _check_numbers(directory, values)
    shapes = _read_shapes(directory, values)
    if values["model_type"].removeprefix("adala_") in FAMILIES:
        _check_config(directory, values, shapes)


def read_shapes(path: str | os.PathLike) -> dict[str, list[int]]:
    """Shapes of the tensors of a safetensors file, from its header.

    Raises:
        CheckpointError: if the file is not one, or its length does not fit its header.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        _refuse(Path(path), f"it is truncated or corrupt ({str(error).splitlines()[0]})")


def _check_links(directory: Path) -> None:
    home = Path(os.path.realpath(directory))
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[1]
    for root, folders, files in os.walk(directory):
        for path in (Path(root, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                where = str(path.relative_to(directory))
                _refuse(directory, f"{where!r} is a link to {os.readlink(path)!r}, outside of it", "Copy the file in")


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        _refuse(directory, "it has no config.json", "Pass a folder that save_pretrained wrote")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        _refuse(directory, f"config.json has {path.stat().st_size:,} bytes")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        _refuse(directory, f"config.json is no JSON ({str(error).splitlines()[0]})")
    if not isinstance(values, dict) or not isinstance(values.setdefault("model_type", ""), str):
        _refuse(directory, "config.json is no configuration: it must be an object whose model_type is a text")
    if not isinstance(values.get("auto_map", {}), dict):
        _refuse(directory, "config.json sets an auto_map that is no object")
    return values


def _check_numbers(directory: Path, values: dict[str, Any]) -> None:
    """What could exhaust the memory while the configuration is built, before it is."""
    for path, number in _numbers(values):
        name = path.rsplit(".", 1)[-1]
        limit = MAX_LAYERS if name in _LAYERS else MAX_INTEGER if isinstance(number, int) else sys.float_info.max
        if not abs(number) <= limit:  # nor is nan
            _refuse(directory, f"config.json sets {path}={str(number)[:20]}, which no model has")
        if number < 1 and name in _AT_LEAST_ONE and not (name == "mlp_ratio" and number > 0):
            _refuse(directory, f"config.json sets {path}={number}, which must be positive")


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """All numbers of a JSON object under their dotted names; those of a list have the name of the list."""
    waiting: list[tuple[str, Any]] = list(values.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _read_shapes(directory: Path, values: dict[str, Any]) -> dict[str, list[int]]:
    """Shapes of all stored tensors; empty where there are no weights at all."""
    files = {path.name for path in directory.glob("*.safetensors")}
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLED)
    if pickled and not files:
        _refuse(
            directory, f"its weights are pickled ({pickled[0]!r})", "Save them as safetensors where they were made"
        )
    if (directory / "adapter_config.json").is_file() and "adapter_model.safetensors" not in files:
        _refuse(directory, "it has an adapter_config.json, but no adapter_model.safetensors")
    index = directory / "model.safetensors.index.json"
    named = [values["transformers_weights"]] if values.get("transformers_weights") is not None else []
    if index.is_file():
        files_known = files | {index.name}
        try:
            named += json.loads(index.read_bytes())["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            _refuse(directory, f"{index.name} is no index of weights")
    else:
        files_known = files
    for name in named:
        if name not in files_known:
            _refuse(directory, f"{name!r} is named as a file of weights, but is none of its safetensors files")
    return {name: shape for file in sorted(files) for name, shape in read_shapes(directory / file).items()}


def _check_config(directory: Path, values: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
        parts = [part for part in (config, *(getattr(config, name) for name in config.sub_configs)) if _is_vit(part)]
        expected = sum(_fewest_parameters(part, shapes) for part in parts)
    except Exception as error:  # values of any wrong type raise errors of any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        _refuse(directory, f"config.json is no configuration ({reason})")
    for part in parts:
        if part.hidden_size % part.num_attention_heads:
            _refuse(
                directory,
                f"config.json sets hidden_size={part.hidden_size}, which is no multiple of"
                f" num_attention_heads={part.num_attention_heads}",
            )
    stored = sum(math.prod(shape) for shape in shapes.values())
    if shapes and expected > 2 * stored:
        _refuse(
            directory, f"config.json describes {expected:,} parameters or more, but the weights hold only {stored:,}"
        )


def _is_vit(config: PretrainedConfig) -> bool:
    return all(isinstance(getattr(config, name, None), int) for name in ("hidden_size", "num_hidden_layers"))


def _fewest_parameters(config: PretrainedConfig, shapes: dict[str, list[int]]) -> int:
    """What every ViT of this configuration has at least, and the heads and tables that could be made huge."""
    width, layers = config.hidden_size, config.num_hidden_layers
    mlp = getattr(config, "intermediate_size", None) or int(width * getattr(config, "mlp_ratio", 0))
    feature_dim = getattr(config, "feature_map_kwargs", {}).get("feature_dim") or 0
    count = layers * width * (4 * width + 2 * mlp + 2 * feature_dim)
    head = (config.architectures or [""])[0]
    if "Classification" in head:
        count += width * config.num_labels
    if "MaskedImageModeling" in head:
        count += width * config.encoder_stride**2 * config.num_channels
    if hasattr(config, "patch_size"):
        patch = math.prod(pair(config.patch_size))
        count += width * patch * config.num_channels
        if any("position_embedding" in name for name in shapes):
            size = getattr(config, "image_size", None)  # SigLIP 2 says how many patches
            count += width * (config.num_patches if size is None else math.prod(pair(size)) // patch)
    return count


def _refuse(path: Path, reason: str, remedy: str = "Get it again from where it comes from") -> NoReturn:
    raise CheckpointError(f"{str(path)!r} is not opened: {reason}. {remedy}.")
