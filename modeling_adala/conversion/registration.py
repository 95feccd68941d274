"""Registration with Transformers: Auto classes, image processors, and the names of weights on disk.

Models that `trust_remote_code` opens need none of it: their `auto_map` says what opens them.
"""

import transformers
from transformers import AutoConfig, AutoImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.utils import is_torchvision_available, is_vision_available

from ..families import FAMILIES, Family
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
