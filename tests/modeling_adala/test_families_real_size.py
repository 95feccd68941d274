"""The published sizes of every family, on the meta device: every name of a checkpoint has its place, old and new.

Only shapes, so that no gigabyte is allocated. The operator is then run on real numbers at each of their head dims.
"""

import pytest
import torch
from family_helpers import lost_keys, stock_config_class
from transformers.core_model_loading import revert_weight_conversion

from modeling_adala import FEATURE_MAPS, build_feature_map, linear_attention, linear_attention_reference
from modeling_adala.attention_interface import is_new_parameter
from modeling_adala.inspection.towers import attention_modules, native_size, patch_size, vision_tower
from modeling_adala.modeling_adala import MODELS, stock_class


def vit(width: int, layers: int, heads: int, mlp: int | None = None, **options) -> dict:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"intermediate_size": mlp or 4 * width} | options


BASE, LARGE, SO400M = (768, 12, 12), (1024, 24, 16), (1152, 27, 16, 4304)


def dinov2(*size: int, **options) -> dict:
    values = vit(*size, patch_size=14, image_size=518, **options)
    values.pop("intermediate_size")
    return values


def siglip_text(*size: int, vocab: int) -> dict:
    return vit(*size, vocab_size=vocab, max_position_embeddings=64, projection_size=size[0])


# checkpoint: family, fields of its configuration, head dim, patches of a native image
CHECKPOINTS: dict[str, tuple[str, dict, int, int]] = {
    "google/vit-base-patch16-224": ("vit", vit(*BASE, patch_size=16, image_size=224), 64, 196),
    "google/vit-large-patch16-384": ("vit", vit(*LARGE, patch_size=16, image_size=384), 64, 576),
    "facebook/deit-base-distilled-patch16-224": ("deit", vit(*BASE, patch_size=16, image_size=224), 64, 196),
    "facebook/deit-base-distilled-patch16-384": ("deit", vit(*BASE, patch_size=16, image_size=384), 64, 576),
    "facebook/ijepa_vith14_1k": ("ijepa", vit(1280, 32, 16, patch_size=14, image_size=224), 80, 256),
    "facebook/ijepa_vitg16_22k": ("ijepa", vit(1408, 40, 16, 6144, patch_size=16, image_size=224), 88, 196),
    "facebook/dinov2-base": ("dinov2", dinov2(*BASE), 64, 1369),
    "facebook/dinov2-large": ("dinov2", dinov2(*LARGE), 64, 1369),
    "facebook/dinov2-giant": ("dinov2", dinov2(1536, 40, 24, use_swiglu_ffn=True), 64, 1369),
    "facebook/dinov2-with-registers-base": (
        "dinov2_with_registers",
        dinov2(*BASE, num_register_tokens=4),
        64,
        1369,
    ),
    "facebook/dinov2-with-registers-large": (
        "dinov2_with_registers",
        dinov2(*LARGE, num_register_tokens=4),
        64,
        1369,
    ),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": (
        "dinov3_vit",
        vit(*BASE, patch_size=16, image_size=224, num_register_tokens=4),
        64,
        196,
    ),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": (
        "dinov3_vit",
        vit(*LARGE, patch_size=16, image_size=224, num_register_tokens=4),
        64,
        196,
    ),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": (
        "dinov3_vit",
        vit(1280, 32, 20, patch_size=16, image_size=224, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
        64,
        196,
    ),
    "openai/clip-vit-base-patch16": (
        "clip",
        {
            "vision_config": vit(*BASE, patch_size=16, image_size=224),
            "text_config": vit(512, 12, 8, vocab_size=49408, max_position_embeddings=77),
            "projection_dim": 512,
        },
        64,
        196,
    ),
    "openai/clip-vit-large-patch14": (
        "clip",
        {
            "vision_config": vit(*LARGE, patch_size=14, image_size=224),
            "text_config": vit(768, 12, 12, vocab_size=49408, max_position_embeddings=77),
            "projection_dim": 768,
        },
        64,
        256,
    ),
    "google/siglip-base-patch16-224": (
        "siglip",
        {
            "vision_config": vit(*BASE, patch_size=16, image_size=224),
            "text_config": siglip_text(*BASE, vocab=32000),
        },
        64,
        196,
    ),
    "google/siglip-so400m-patch14-384": (
        "siglip",
        {
            "vision_config": vit(*SO400M, patch_size=14, image_size=384),
            "text_config": siglip_text(*SO400M, vocab=32000),
        },
        72,
        729,
    ),
    "google/siglip2-base-patch16-naflex": (
        "siglip2",
        {
            "vision_config": vit(*BASE, patch_size=16, num_patches=256),
            "text_config": siglip_text(*BASE, vocab=256000),
        },
        64,
        256,
    ),
    "google/siglip2-so400m-patch16-naflex": (
        "siglip2",
        {
            "vision_config": vit(*SO400M, patch_size=16, num_patches=256),
            "text_config": siglip_text(*SO400M, vocab=256000),
        },
        72,
        256,
    ),
}
# a vision tower is a family of its own, with the same weights
CHECKPOINTS |= {
    f"{name} (vision)": (f"{family}_vision_model", fields["vision_config"], head_dim, patches)
    for name, (family, fields, head_dim, patches) in CHECKPOINTS.items()
    if "vision_config" in fields
}
HEAD_DIMS = sorted({head_dim for _, _, head_dim, _ in CHECKPOINTS.values()})


def test_every_family_is_among_them():
    assert {family for family, *_ in CHECKPOINTS.values()} == set(MODELS)
    assert HEAD_DIMS == [64, 72, 80, 88]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_names_of_the_published_sizes_agree_old_and_new(checkpoint):
    name, fields, head_dim, patches = CHECKPOINTS[checkpoint]
    family = MODELS[name]
    config = stock_config_class(family)(**fields)
    with torch.device("meta"):
        stock = stock_class(family["Model"])(config)
    student_class, student_config = family["Model"], family["Model"].config_class(**fields)
    new_names = stock.state_dict()
    old_names = revert_weight_conversion(stock, new_names)
    for weights in (new_names, old_names):
        student, info = student_class.from_pretrained(
            None, config=student_config, state_dict=dict(weights), device_map="meta", output_loading_info=True
        )
        assert not lost_keys(info)
        modules = attention_modules(student)
        layers = vision_tower(stock).config.num_hidden_layers
        assert len(modules) == layers
        assert (
            len(info["missing_keys"]) == 5 * layers
        )  # projections of queries and keys with their biases, local mixing
        assert {module.head_dim for module in modules} == {head_dim}
        shapes = {key: value.shape for key, value in student.state_dict().items() if not is_new_parameter(key)}
        assert shapes == {key: value.shape for key, value in new_names.items()}
    rows, columns = (side // patch for side, patch in zip(native_size(config), patch_size(config)))
    assert rows * columns == patches


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_operator_takes_their_head_dims(head_dim, feature_map):
    query, key, value = (torch.randn(2, 9, 3, head_dim).transpose(1, 2).requires_grad_() for _ in range(3))
    phi = build_feature_map(feature_map, num_heads=3, head_dim=head_dim)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    results = []
    for operator in (linear_attention, linear_attention_reference):
        output = operator(query, key, value, phi, mask)
        results.append([output, *torch.autograd.grad(output.square().sum(), (query, key, value))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
