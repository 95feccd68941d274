"""Registration with Transformers: Auto classes, image processors, and the names of weights on disk.

Models that `trust_remote_code` opens need none of it: their `auto_map` says what opens them.
"""

import functools
import os
from collections.abc import Callable
from os import PathLike
from typing import Any

import transformers
from huggingface_hub import is_offline_mode
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.utils import is_torchvision_available, is_vision_available

from ..families import FAMILIES, Family, find_family, is_adala
from ..modeling_adala import AUTO_CLASSES, MODELS, auto_classes
from .upstream import WeightRenaming, get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping


def register() -> None:
    """Register all configurations and models. Calling it again changes nothing."""
    for name, classes in MODELS.items():
        config_class = classes["Model"].config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in auto_classes(name).items():
            getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
        for head, model_class in classes.items():
            if head in AUTO_CLASSES:
                model_class.register_for_auto_class(AUTO_CLASSES[head])  # its checkpoints carry this code
            _register_names_on_disk(FAMILIES[name], model_class)
        if is_vision_available():  # without Pillow there is no image processor
            _register_image_processor(FAMILIES[name], config_class)
    if not hasattr(AutoBackbone.from_pretrained, "__wrapped__"):
        AutoBackbone.from_pretrained = classmethod(_opens_own_backbones(AutoBackbone.from_pretrained.__func__))


def _opens_own_backbones(stock: Callable) -> Callable:
    """Return `AutoBackbone.from_pretrained` that opens AdaLA checkpoints in local folders and offline, too.

    The stock method (5.24, `if not hf_api().repo_exists(...)` in models/auto/auto_factory.py) asks the Hub before it
    looks anywhere, and sends every path that is no repository there to timm.
    """

    @functools.wraps(stock)
    def from_pretrained(cls: type[AutoBackbone], name: str | PathLike, *args: Any, **kwargs: Any) -> PreTrainedModel:
        if (os.path.isdir(name) or is_offline_mode()) and _is_own(name, kwargs):
            kwargs.pop("use_timm_backbone", None)
            return super(AutoBackbone.__base__, cls).from_pretrained(name, *args, **kwargs)
        return stock(cls, name, *args, **kwargs)

    return from_pretrained


def _is_own(name: str | PathLike, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("config") is not None:
        return is_adala(kwargs["config"])
    where = {key: kwargs[key] for key in ("revision", "subfolder", "cache_dir", "local_files_only") if key in kwargs}
    try:
        found = PretrainedConfig.get_config_dict(name, **where)[0].get("model_type", "")
    except OSError:  # the stock method says so
        return False
    family = find_family(found)
    return family is not None and found == family.adala


def _register_names_on_disk(family: Family, model_class: type[PreTrainedModel]) -> None:
    # Checkpoints hold the old names of each family, and the renaming is looked up by class name or model type. Without
    # this a stock checkpoint loads with its attention and MLP weights left random, and only a printed report says so.
    if family is FAMILIES["dinov3_vit"]:
        # the stock pattern (5.23) has an unescaped dot, and inside a head it takes `layer_scale1` for a layer as well
        renaming = [WeightRenaming(r"(?<!model\.)layer\.", r"model.layer.")]
        register_checkpoint_conversion_mapping(model_class.__name__, renaming, overwrite=True)
        return
    for name in (model_class.__bases__[-1].__name__, family.stock):
        mapping = get_checkpoint_conversion_mapping(name)
        if mapping is not None:
            register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)
            return


def _register_image_processor(family: Family, config_class: type[PretrainedConfig]) -> None:
    processors = {"pil": getattr(transformers, f"{family.image_processor}Pil")}
    if is_torchvision_available():  # asking for the torchvision one without it prints a warning
        processors["torchvision"] = getattr(transformers, family.image_processor)
    AutoImageProcessor.register(config_class, image_processor_classes=processors, exist_ok=True)
