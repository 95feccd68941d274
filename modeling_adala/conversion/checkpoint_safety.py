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

from transformers import CONFIG_MAPPING, PretrainedConfig

from ..configuration_adala import pair
from ..errors import CheckpointError
from ..families import find_family
from .stored_weights import read_tensors, replace_it, weight_files

# Attention implementations that are code of Transformers or ours. Any other name is a repository of kernels to run.
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "adala")
MAX_LAYERS = 1_000
MAX_SIZE = 1_000_000
MAX_CONFIG_BYTES = 2**24  # ImageNet-22k's names, twice over, are a tenth of that

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
# What decides how much memory a configuration or its model takes. Any other number, such as a count of parameters, is
# free.
_SIZES = _AT_LEAST_ONE | {
    "num_labels",
    "num_register_tokens",
    "feature_dim",
    "projection_dim",
    "projection_size",
    "pooler_output_size",
    "vocab_size",
    "max_position_embeddings",
}
_ATTENTION_FIELDS = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}


def check_checkpoint(directory: str | os.PathLike) -> None:
    """Refuse a checkpoint folder that should not be opened. Hub ids are not for here: the Hub's client checks those.

    A folder inside the Hub's cache, whose files are links to the cache's own blobs, passes.

    Args:
        directory (`str` or `os.PathLike`): The folder, with a config.json. Weights may be missing.

    Raises:
        CheckpointError: for a link that leads out of the folder, weights that are pickled or outside of it, adapters,
            a safetensors file that is truncated or corrupt, and a config.json that is not valid: wrong types,
            sizes below 1 or beyond any model, more parameters than the weights could ever fill, or an attention
            implementation from elsewhere.
    """
    directory = Path(directory)
    _check_links(directory)
    values = _read_config(directory)
    _check_values(directory, values)
    if (directory / "adapter_config.json").exists():
        _refuse(directory, "it holds adapters", "Merge them with merge_and_unload and save the model whole")
    weights = weight_files(directory)
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled and not weights:
        _refuse(
            directory, f"its weights are pickled ({pickled[0]!r})", "Save them as safetensors where they were made"
        )
    tensors = {name: tensor for file in weights for name, tensor in read_tensors(file).items()}
    family = find_family(values["model_type"])
    if family is not None and values["model_type"] not in family.aliases:
        _check_config(directory, values, {name: tensor.shape for name, tensor in tensors.items()})


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
        _refuse(directory, f"config.json is not valid JSON ({str(error).splitlines()[0]})")
    if not isinstance(values, dict) or not isinstance(values.setdefault("model_type", ""), str):
        _refuse(directory, "config.json is not a valid configuration: it must be an object, its model_type a string")
    if not isinstance(values.get("auto_map", {}), dict):
        _refuse(directory, "config.json sets an auto_map that is not an object")
    if values.get("transformers_weights") is not None:
        remedy = "Name the file model.safetensors and remove the line"
        _refuse(directory, f"config.json sets transformers_weights={values['transformers_weights']!r}", remedy)
    return values


def _check_values(directory: Path, values: dict[str, Any]) -> None:
    """Refuse values that could exhaust the memory, or run code, while the configuration and its model are built."""
    for path, value in _flat({key: values[key] for key in values if key not in ("id2label", "label2id")}):
        name = path.rsplit(".", 1)[-1]
        if _ATTENTION_FIELDS & set(path.split(".")) and value is not None and value not in ATTENTIONS:
            reason = f"config.json sets {path}={value!r}, which would run code from elsewhere"
            _refuse(directory, reason, "Remove it from config.json")
        if isinstance(value, int | float) and not isinstance(value, bool):
            # by its end: some models have a `decoder_hidden_size`, too
            is_size, is_depth = name.endswith(tuple(_SIZES)), name.endswith(tuple(_LAYERS))
            limit = MAX_LAYERS if is_depth else MAX_SIZE if is_size else sys.float_info.max
            if not abs(value) <= limit:  # nor is nan
                _refuse(directory, f"config.json sets {path}={str(value)[:20]}, which is out of range")
            if value < 1 and name in _AT_LEAST_ONE and not (name == "mlp_ratio" and value > 0):
                _refuse(directory, f"config.json sets {path}={value}, which must be positive")


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all values of a JSON object under their dotted names; those of a list have the name of the list."""
    waiting: list[tuple[str, Any]] = list(values.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        else:
            yield name, value


def _check_config(directory: Path, values: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
        parts = [part for part in (config, *(getattr(config, name) for name in config.sub_configs)) if _is_vit(part)]
        expected = sum(_fewest_parameters(part, shapes) for part in parts)
    except Exception as error:  # values of any wrong type raise errors of any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        _refuse(directory, f"config.json is not a valid configuration ({reason})")
    for part in parts:
        if part.hidden_size % part.num_attention_heads:
            _refuse(
                directory,
                f"config.json sets hidden_size={part.hidden_size}, which is not a multiple of"
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
    """Count what every ViT of this configuration has at least, and the heads and tables that could be made huge."""
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


def _refuse(path: Path, reason: str, remedy: str | None = None) -> NoReturn:
    raise CheckpointError(f"{str(path)!r} is not opened: {reason}. {remedy or replace_it(path)}.")
