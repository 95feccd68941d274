"""The family table: every fact that differs between the supported architectures."""

from dataclasses import dataclass
from typing import Any

from .errors import UsageError


@dataclass(frozen=True)
class Family:
    """One row of the family table. A new family is a row here, a configuration, and a block of classes.

    Args:
        stock (`str`): `model_type` of the stock configuration.
        adala (`str`): `model_type` of ours.
        image_processor (`str`): Class of Transformers that prepares its images.
        vision (`str`): Row of the vision tower, for a model that also has a text tower.
        aliases (`tuple[str, ...]`): Stock model types of the same architecture with the same names on disk.
        class_tokens (`int`): Tokens before the patches, registers aside.
        any_size (`bool`): Takes images of any size without `interpolate_pos_encoding`.
        packed (`bool`): Takes packed patches with their grid (NaFlex), not images.
        last_norm (`str`): Name of the norm after the last block.
        normalizes_last (`bool`): `last_hidden_state` comes after that norm.
        output_projection (`str`): Name of the projection after the heads.
        pooler (`str`): Module of the base model that a backbone leaves out.
        passes_kwargs (`bool`): Attention modules hand their keyword arguments on to the attention interface.
        rotary (`bool`): Rotates queries and keys between their projections and attention.
    """

    stock: str
    adala: str
    image_processor: str
    vision: str | None = None
    aliases: tuple[str, ...] = ()
    class_tokens: int = 1
    any_size: bool = False
    packed: bool = False
    last_norm: str = "layernorm"
    normalizes_last: bool = True
    output_projection: str = "o_proj"
    pooler: str = "pooler"
    passes_kwargs: bool = True
    rotary: bool = False


_CLIP: dict[str, Any] = {
    "image_processor": "CLIPImageProcessor",
    "last_norm": "post_layernorm",
    "output_projection": "out_proj",
}
_SIGLIP: dict[str, Any] = {
    "last_norm": "post_layernorm",
    "output_projection": "out_proj",
    "class_tokens": 0,
    "pooler": "head",
}
_SIGLIP1 = _SIGLIP | {"image_processor": "SiglipImageProcessor", "passes_kwargs": False}
_SIGLIP2 = _SIGLIP | {"image_processor": "Siglip2ImageProcessor", "passes_kwargs": False, "packed": True}

ROWS: tuple[Family, ...] = (
    Family("vit", "adala_vit", "ViTImageProcessor", aliases=("vit_mae", "vit_msn")),
    Family("deit", "adala_deit", "DeiTImageProcessor", class_tokens=2),
    Family("ijepa", "adala_ijepa", "ViTImageProcessor", class_tokens=0),
    Family("dinov2", "adala_dinov2", "BitImageProcessor", any_size=True),
    Family("dinov2_with_registers", "adala_dinov2_with_registers", "BitImageProcessor", any_size=True),
    # its own image processor exists for torchvision only; that of ViT does the same
    Family("dinov3_vit", "adala_dinov3_vit", "ViTImageProcessor", any_size=True, last_norm="norm", rotary=True),
    Family("clip_vision_model", "adala_clip_vision_model", **_CLIP, normalizes_last=False),
    Family("clip", "adala_clip", **_CLIP, vision="clip_vision_model"),
    Family("siglip_vision_model", "adala_siglip_vision_model", **_SIGLIP1),
    Family("siglip", "adala_siglip", **_SIGLIP1, vision="siglip_vision_model"),
    Family("siglip2_vision_model", "adala_siglip2_vision_model", **_SIGLIP2),
    Family("siglip2", "adala_siglip2", **_SIGLIP2, vision="siglip2_vision_model"),
)

FAMILIES: dict[str, Family] = {row.stock: row for row in ROWS}
_BY_MODEL_TYPE = {name: row for row in ROWS for name in (row.stock, row.adala, *row.aliases)}


def find_family(model_type: str) -> Family | None:
    """Return the row of a stock or an AdaLA `model_type`, or `None`."""
    return _BY_MODEL_TYPE.get(model_type)


def get_family(model_type: str) -> Family:
    """Return the row of a stock or an AdaLA `model_type`.

    Raises:
        UsageError: For an unsupported architecture; the message names those that are supported.
    """
    family = find_family(model_type)
    if family is None:
        known = ", ".join([*FAMILIES, *(name for row in ROWS for name in row.aliases)])
        raise UsageError(f"model_type {model_type!r} is not supported; choose a teacher of {known}.")
    return family


def is_adala(config: Any) -> bool:
    """Return whether a configuration is one of ours, of a vision tower or of a model that has one."""
    family = find_family(getattr(config, "model_type", ""))
    return family is not None and config.model_type == family.adala
