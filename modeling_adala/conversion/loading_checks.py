"""Checks of a model or an image processor that has been opened, before anyone computes with it."""

import logging
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..attention_interface import is_new_parameter
from ..errors import CheckpointError
from ..families import is_adala
from ..inspection.towers import vision_tower
from ..modeling_adala import head_of, models_of
from .stored_weights import nonfinite_names, replace_it

logger = logging.getLogger(__name__)


def check_complete(
    model: PreTrainedModel, info: dict[str, Any], config: PretrainedConfig, what: str, new_head: bool, new_labels: bool
) -> None:
    """Refuse a model some of whose weights stayed random, or whose checkpoint holds more than its class should have.

    Args:
        model (`PreTrainedModel`): As it was opened.
        info (`dict`): What `output_loading_info=True` gave.
        config (`PretrainedConfig`): The checkpoint's own, before anyone changed it.
        what (`str`): How messages call the model.
        new_head (`bool`): Whether a head that the checkpoint was not saved with may start at random.
        new_labels (`bool`): Whether a head for another number of classes may do so.

    Raises:
        CheckpointError: with the counts and an example of each.
    """
    is_new = new_head and head_of(config, saved_as(config)) != head_of(model.config, type(model).__name__)
    inside, missing = _keys_inside(model), set(info["missing_keys"])
    if not is_adala(config):
        missing = {key for key in missing if not is_new_parameter(key)}
        pooler = {key for key in inside if re.search(r"(^|\.)pooler\.", key)}
        if pooler and pooler <= missing:  # DINO's checkpoints, for instance, have none
            logger.warning("%s has no pooler: pooler_output starts at random", what)
            missing -= pooler
    if is_new:
        missing = {key for key in missing if key in inside and not key.endswith("mask_token")}
    sizes = {key: shapes for key, *shapes in info["mismatched_keys"] if key in inside or not (is_new or new_labels)}
    # no feature depends on a mask token: only masked images see it
    unexpected = {key for key in info["unexpected_keys"] if not key.endswith("mask_token")}
    if unexpected:
        unexpected -= _keys_left_out(model, config, unexpected)
    found = []
    if missing:
        found.append(f"missing weights: {len(missing)} of {len(model.state_dict())}, such as {min(missing)!r}")
    if unexpected:
        found.append(
            f"weights that {type(model).__name__} does not have: {len(unexpected)}, such as {min(unexpected)!r}"
        )
    if sizes:
        key = min(sizes)
        stored, wanted = (tuple(shape) for shape in sizes[key])
        found.append(f"weights of another size: {len(sizes)}, such as {key!r} ({stored} stored, {wanted} expected)")
    if found:
        raise CheckpointError(
            f"{what} does not fit its config.json: {'; '.join(found)}. Undo the change in either of them."
            f" {replace_it(config.name_or_path)}."
        )


def _keys_inside(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that are not part of a head: those of the vision and the text tower."""
    texts = [module for name, module in model.named_modules() if name.split(".")[-1] == "text_model"]
    towers = [vision_tower(model), *texts]
    ours = {id(tensor) for tower in towers for tensor in tower.state_dict(keep_vars=True).values()}
    return {key for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in ours}


def _keys_left_out(model: PreTrainedModel, config: PretrainedConfig, unexpected: Iterable[str]) -> set[str]:
    """Return those of the unexpected keys that belong to the class the checkpoint was saved as, such as a pooler."""
    classes = {cls.__name__: cls for cls in models_of(config).values()}
    saved_class: Any = classes.get(saved_as(config)) or getattr(transformers, saved_as(config), None)
    if getattr(saved_class, "config_class", None) is not type(config):
        return set()
    with torch.device("meta"):
        known = saved_class(config).state_dict()
    prefixes = {f"{cls.base_model_prefix}." for cls in (saved_class, model)} | {"vision_model."}

    def bare(key: str) -> str:
        return next((key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)), key)

    bare_names = {bare(key) for key in known}
    return {key for key in unexpected if bare(key) in bare_names}


def check_finite(model: PreTrainedModel, what: str) -> None:
    """Refuse a model with weights that are NaN or infinite; `what` is how the message calls it.

    Raises:
        CheckpointError: with their number and the first of them.
    """
    tensors: dict[str, Tensor] = model.state_dict()
    bad = nonfinite_names(tensors)
    if bad:
        raise CheckpointError(
            f"{what} holds non-finite weights in {len(bad)} of {len(tensors)} tensors (first: {bad[0]!r}). Pass an"
            f" earlier checkpoint. {replace_it(model.config.name_or_path)}."
        )


def check_image_processor(name: str, values: Any) -> None:
    """Refuse an image processor that would not normalize as it should.

    Args:
        name (`str`): The checkpoint that it belongs to.
        values (`dict`): Its preprocessor_config.json.

    Raises:
        CheckpointError: for a mean, a standard deviation or a factor that is missing, not finite or not positive, and
            for flags and filters that are not valid.
    """
    if not isinstance(values, dict):
        refuse_image_processor(name, "its configuration must be a JSON object")
    for key in ("do_rescale", "do_normalize"):
        if not isinstance(values.get(key, True), bool | None):
            refuse_image_processor(name, f"{key}={values[key]!r} must be true or false")
    factor = values.get("rescale_factor")
    if factor is not None and not (_is_number(factor) and factor > 0):
        refuse_image_processor(name, f"rescale_factor={factor!r} must be a positive number")
    resample = values.get("resample")
    if resample is not None and resample not in range(6):
        refuse_image_processor(name, f"resample={resample!r} must be one of Pillow's filters, 0 to 5")
    if values.get("do_normalize") is False:
        return
    for key in ("image_mean", "image_std"):
        found = values.get(key)
        numbers = found if isinstance(found, list) else [found]
        if len(numbers) not in (1, 3) or not all(_is_number(number) for number in numbers):
            refuse_image_processor(name, f"{key}={found!r} must be one finite number, or three (one per channel)")
        if key == "image_std" and min(numbers) <= 0:
            refuse_image_processor(name, f"image_std={found!r} must be positive")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def refuse_image_processor(name: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    """Raise the one line about an image processor that is not used."""
    raise CheckpointError(
        f"the image processor of {name!r} is not used: {reason}. Get a fresh copy of"
        " preprocessor_config.json from its source."
    ) from cause


def saved_as(config: PretrainedConfig) -> str:
    """Return the name of the class that a checkpoint was saved as, or an empty one."""
    return str((config.architectures or [""])[0])


def reason_of(error: BaseException) -> str:
    """Return the first line of an error as a sentence, with its type where the message alone says nothing."""
    text = (str(error).strip().splitlines() or [""])[0]
    if not text or isinstance(error, KeyError | AttributeError | TypeError):
        text = f"{type(error).__name__}: {text}"
    return text if text.endswith(".") else f"{text}."
