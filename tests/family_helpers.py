"""Tiny models and inputs of every family, made from the fields that its stock configuration has."""

from inspect import signature

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from modeling_adala.attention_interface import is_new_parameter
from modeling_adala.inspection.towers import vision_tower
from modeling_adala.mixins import image_inputs, num_special_tokens
from modeling_adala.modeling_adala import MODELS, stock_class

# A configuration takes what it has a field for. A family that needs another field gets it here, in one line.
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
    "image_size": 32,
    "num_patches": 16,
    "num_register_tokens": 3,
    "encoder_stride": 8,
    "mlp_ratio": 2,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "projection_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NATIVE, RECTANGULAR = (32, 32), (24, 48)
CASES = [(name, head) for name, family in MODELS.items() for head in family]
# what AdaLA's own segmentation head adds
HEAD = ("classifier.", "batch_norm.")


def tiny_config(config_class: type[PretrainedConfig], **options) -> PretrainedConfig:
    """A stock or an AdaLA configuration; `options` go to the vision part."""
    towers = {
        name: spec for name, spec in config_class.sub_configs.items() if name in ("vision_config", "text_config")
    }
    if not towers:
        values = TINY | options
        return config_class(**{name: value for name, value in values.items() if name in _fields(config_class)})
    parts = {"vision_config": options, "text_config": {}}
    values = {name: tiny_config(towers[name], **parts[name]).to_dict() for name in towers}
    return config_class(**values, **({"projection_dim": 16} if "projection_dim" in _fields(config_class) else {}))


def _fields(config_class: type[PretrainedConfig]) -> set[str]:
    return {*config_class.__dataclass_fields__, "num_labels", "out_features", "out_indices"}


def stock_config_class(family: dict) -> type[PretrainedConfig]:
    return next(
        base for base in family["Model"].config_class.__mro__ if base.__module__.startswith("transformers.models.")
    )


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """In eval mode, and no parameter but those of the feature maps has a special value: attention is far from flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not is_new_parameter(name):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def stock_model(name: str, head: str = "Model", **options) -> PreTrainedModel:
    """The softmax model of a head, or the base model where only AdaLA has that head."""
    family = MODELS[name]
    model_class = stock_class(family[head]) or stock_class(family["Model"])
    torch.manual_seed(0)
    return randomize(model_class(tiny_config(stock_config_class(family), **options)))


def is_vision_text(name: str) -> bool:
    return "text_config" in MODELS[name]["Model"].config_class.sub_configs


def inputs_of(
    model: PreTrainedModel, size: tuple[int, int] = NATIVE, batch: int = 2, seed: int = 0
) -> dict[str, Tensor]:
    """All that `forward` needs: images of any size and, for a model with both towers, two captions."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, *size, generator=generator)
    names = signature(model.forward).parameters
    if "out_features" in dir(vision_tower(model)):  # a backbone, or a head on one, tells itself
        return {"pixel_values": pixels}
    inputs = image_inputs(vision_tower(model).config, pixels)
    if "input_ids" in names:
        inputs["input_ids"] = torch.tensor([[1, 5, 9, 7, 2, 2], [1, 8, 3, 2, 2, 2]])
    return inputs


def token_mask(model: PreTrainedModel, size: tuple[int, int] = NATIVE, batch: int = 2) -> Tensor:
    """A key-padding mask `(batch, tokens)` that hides the lower half of the last image."""
    config = vision_tower(model).config
    patches = size[0] // config.patch_size * (size[1] // config.patch_size)
    mask = torch.ones(batch, num_special_tokens(config) + patches, dtype=torch.long)
    mask[-1, -patches // 2 :] = 0
    return mask


def padded_inputs(model: PreTrainedModel, size: tuple[int, int] = NATIVE) -> dict[str, Tensor] | None:
    """The same with padding in the last image, or `None` for a `forward` that takes no mask of the patches."""
    names, inputs = signature(model.forward).parameters, inputs_of(model, size)
    if "pixel_attention_mask" in inputs:
        inputs["pixel_attention_mask"][-1, inputs["pixel_attention_mask"].shape[1] // 2 :] = 0
        inputs["spatial_shapes"][-1, 0] //= 2
        return inputs
    if "attention_mask" in names and "input_ids" not in names:
        return inputs | {"attention_mask": token_mask(model, size)}
    return None


def tensors(output) -> list[Tensor]:
    """All tensors of a model output, flat."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [x for value in values if value is not None for x in tensors(value)]


def lost_keys(info: dict, *extra: str) -> set[str]:
    """Return the keys that loading missed or did not expect, without new parameters and what starts with `extra`."""
    names = {*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return {name for name in names if not is_new_parameter(name) and not name.startswith(extra or ("\0",))}
