"""`inspect` against measurements: PyTorch's own FLOP counter, and what autograd really keeps."""

import json
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    SiglipConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from modeling_adala import UsageError
from modeling_adala.conversion.convert import student_config
from modeling_adala.families import get_family
from modeling_adala.inspection.flops import (
    BreakEven,
    break_even,
    image_cost,
    linear_config,
    nearest_size,
    num_features,
)
from modeling_adala.inspection.towers import forward_tower
from modeling_adala.modeling_adala import MODELS
from vit_adala.cli import main

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
# the configurations of the published checkpoints
PUBLISHED = {
    "ViT-B/16": (ViTConfig, {}),
    "DINOv2-L": (Dinov2Config, LARGE | {"image_size": 518, "patch_size": 14}),
    "CLIP-L": (CLIPVisionConfig, LARGE | {"intermediate_size": 4096, "patch_size": 14}),
    "SigLIP-So400m": (
        SiglipVisionConfig,
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
    ),
    "DINOv3-L": (DINOv3ViTConfig, LARGE | {"intermediate_size": 4096, "num_register_tokens": 4}),
}
REAL = {name: config_class(**options) for name, (config_class, options) in PUBLISHED.items()}
TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 4}
TOWERS = [name for name in MODELS if name not in ("clip", "siglip", "siglip2")]
VARIANTS = {
    **{name: (name, {}) for name in TOWERS},
    **{f"vit, {name}": ("vit", {"feature_map": name}) for name in ("elu", "relu", "t2r")},
    **{f"{name}, local mixing": (name, {"local_mixing": 3}) for name in ("vit", "siglip_vision_model")},
    **{f"{name}, dynamic mixing": (name, {"dynamic_mixing": True}) for name in ("vit", "siglip2_vision_model")},
    "fewer features": ("vit", {"feature_map_kwargs": {"feature_dim": 8}}),
    "hybrid": ("dinov2", {"softmax_layers": [-1]}),
    "SwiGLU": ("dinov2", {"use_swiglu_ffn": True}),
    "gated MLP": ("dinov3_vit", {"use_gated_mlp": True}),
    "no pooling": ("siglip_vision_model", {"vision_use_head": False}),
}


def tiny(variant: str):
    family, options = VARIANTS[variant]
    size = {"num_patches": 64} if family == "siglip2_vision_model" else {"image_size": 32}
    mlp = {} if family.startswith("dinov2") else {"intermediate_size": 96}
    return MODELS[family]["Model"].config_class(**TINY, **size, **mlp, **options)


def build(config):
    classes = MODELS[get_family(config.model_type).stock]
    return classes["Model" if "Model" in classes else "VisionModel"](config).eval()


def counted(model, pixel_values, attention: str) -> int:
    model.set_attn_implementation({"linear": "adala"}.get(attention, attention))
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            forward_tower(model, pixel_values)
    return counter.get_total_flops()


def kept_bytes(model, pixel_values, attention: str) -> int:
    """What autograd keeps of a forward pass besides the parameters."""
    model.set_attn_implementation({"linear": "adala"}.get(attention, attention))
    weights, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward_tower(model, pixel_values)  # holds the graph, and the graph what it kept
    assert output is not None
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in weights)


@pytest.mark.parametrize("name", REAL)
def test_flops_of_real_models_are_those_of_the_flop_counter(name):
    (config_class, options), config, counts = PUBLISHED[name], REAL[name], {}
    sizes = [nearest_size(config, side) for side in (224, 512, 1024, 2048)]
    with torch.device("meta"):
        for layers in (1, 2):  # all are alike, and running them all takes minutes
            model = build(student_config(config_class(**options | {"num_hidden_layers": layers})))
            for size, attention in product(sizes, ("sdpa", "linear")):
                counts[layers, size, attention] = counted(model, torch.empty(1, 3, *size), attention)
    for size, attention in product(sizes, ("sdpa", "linear")):
        one, two = (counts[layers, size, attention] for layers in (1, 2))
        flops = one + (config.num_hidden_layers - 1) * (two - one)
        assert image_cost(config, size, attention).flops == pytest.approx(flops, rel=0.02), (size, attention)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_and_memory_of_every_family_are_what_a_forward_pass_takes(variant):
    config = tiny(variant)
    model, size = build(config), (32, 48)
    pixels = torch.randn(1, 3, *size)
    for attention in ("eager", "sdpa", "linear"):
        cost = image_cost(config, size, attention)
        assert cost.memory == pytest.approx(kept_bytes(model, pixels, attention), rel=0.07), attention
        if attention != "sdpa" and (attention, variant) != ("linear", "hybrid"):  # the counter misses SDPA on the CPU
            # SigLIP 2 resizes its positions by a product, 2 % of a model as small as this one
            assert cost.flops == pytest.approx(counted(model, pixels, attention), rel=0.03), attention


def test_attention_is_what_differs_between_softmax_and_linear():
    softmax, linear = (image_cost(REAL["DINOv3-L"], (512, 512), name) for name in ("sdpa", "linear"))
    assert softmax.flops - linear.flops == softmax.attention_flops - linear.attention_flops > 0
    eager = image_cost(REAL["DINOv3-L"], (512, 512), "eager")
    assert eager.flops == softmax.flops
    assert eager.memory - softmax.memory == eager.attention_memory - softmax.attention_memory > 0


def test_stock_and_converted_configurations_cost_the_same():
    for config in REAL.values():
        costs = [image_cost(c, (448, 448), "linear") for c in (config, student_config(config))]
        assert costs[0] == costs[1]


def test_hedgehog_doubles_the_features():
    features = {name: num_features(student_config(ViTConfig(), feature_map=name)) for name in ("elu", "hedgehog")}
    assert features == {"elu": 64, "hedgehog": 128}


@pytest.mark.parametrize("variant", ["ijepa", "vit, elu", "vit, t2r", "fewer features"])
def test_break_even_is_where_the_costs_cross(variant):
    config = tiny(variant)
    met, patch = break_even(config), config.patch_size
    softmax, linear = (
        [image_cost(config, (met.image_size + step,) * 2, name).attention_flops for step in (-patch, 0)]
        for name in ("sdpa", "linear")
    )
    assert softmax[0] < linear[0]
    assert softmax[1] >= linear[1]


def test_break_even_of_known_models():
    assert break_even(REAL["ViT-B/16"]) == BreakEven(tokens=133, image_size=192)
    assert break_even(REAL["SigLIP-So400m"]) == BreakEven(tokens=149, image_size=182)
    assert break_even(student_config(ViTConfig(), softmax_layers=list(range(12)))) is None


def test_softmax_layers_cost_what_softmax_costs():
    hybrid = student_config(ViTConfig(), softmax_layers=[0, 5, -1])
    mixed, softmax = (image_cost(hybrid, (1024, 1024), name).attention_flops for name in ("linear", "sdpa"))
    linear = image_cost(ViTConfig(), (1024, 1024), "linear").attention_flops
    assert mixed == linear * 9 // 12 + softmax * 3 // 12


def test_sizes_are_rounded_to_whole_patches():
    config = REAL["DINOv2-L"]
    assert nearest_size(config, 512) == (518, 518)
    assert nearest_size(config, (1, 1000)) == (14, 994)
    with pytest.raises(UsageError, match="1 pixel or more"):
        nearest_size(config, (224, 0))


def test_encoders_that_are_a_vit_by_another_name_count_as_one():
    assert linear_config(ViTMAEConfig()).model_type == "adala_vit"
    assert image_cost(ViTMAEConfig(), (224, 224), "sdpa").flops == image_cost(ViTConfig(), (224, 224), "sdpa").flops


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Folders with a config.json and nothing else."""
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    configs = {
        "dinov2": REAL["DINOv2-L"],
        "clip": CLIPConfig(vision_config=vision),
        "siglip": SiglipConfig(vision_config=vision),
        "hybrid": student_config(ViTConfig(), softmax_layers=[-1], feature_map="elu"),
        "swin": SwinConfig(),
    }
    root = tmp_path_factory.mktemp("configs")
    for name, config in configs.items():
        config.save_pretrained(root / name)
    return {name: str(root / name) for name in configs}


def inspected(capsys, *argv: str) -> dict:
    assert main(["inspect", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_of_a_stock_model_from_its_configuration_file(capsys, folders):
    facts = inspected(capsys, f"{folders['dinov2']}/config.json", "--image-size", "512", "336x448")
    assert (facts["model_type"], facts["is_linear"]) == ("dinov2", False)
    assert (facts["num_hidden_layers"], facts["num_attention_heads"], facts["head_dim"]) == (24, 16, 64)
    assert facts["linear_layers"] == list(range(24))
    assert facts["stays_softmax"] == []
    assert [size["image_size"] for size in facts["sizes"]] == [[518, 518], [336, 448]]
    assert [size["tokens"] for size in facts["sizes"]] == [37 * 37 + 1, 24 * 32 + 1]
    assert facts["sizes"][1]["sdpa"]["flops"] == image_cost(REAL["DINOv2-L"], (336, 448), "sdpa").flops


@pytest.mark.parametrize(
    "name, parts",
    [("clip", ["text tower"]), ("siglip", ["attention pooling", "text tower"]), ("hybrid", ["layer 11"])],
)
def test_what_stays_softmax_is_named(capsys, folders, name, parts):
    found = inspected(capsys, folders[name])["stays_softmax"]
    assert len(found) == len(parts)
    assert all(part in text for part, text in zip(parts, found))


def test_table_fits_and_says_what_was_rounded(capsys, folders):
    assert main(["inspect", folders["dinov2"]]) == 0
    text = capsys.readouterr().out
    assert "attention of all 24 layers (power, 64 features per head, local mixing 3x3)" in text
    assert "512x512 -> 518x518" in text
    assert "break-even in FLOPs: 133 tokens (168x168)" in text
    assert "1 multiply-add = 2 FLOPs" in text
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert max(map(len, rows)) <= 100
    assert sum("518x518" in row for row in rows) == 2  # once in each table, though 512 rounds to the native size
    assert any("1.01 T" in row and "847 G" in row for row in rows)


@pytest.mark.parametrize(
    "argv, code, parts",
    [
        (["@swin"], 2, ["'swin' is not supported", "dinov2"]),
        (["@dinov2", "--image-size", "0"], 2, ["image_size=(0, 0)", "1 pixel or more"]),
        (["@dinov2", "--image-size", "big"], 2, ["'big'", "336x448"]),
        (["@dinov2", "--image-size"], 2, ["--image-size", "expected a value"]),
        (["nobody/nothing"], 1, ["'nobody/nothing'", "offline"]),
        ([], 2, ["required: MODEL", "--help"]),
        (["@dinov2", "--sizes", "3"], 2, ["--sizes", "--help"]),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, folders, argv, code, parts):
    given = [folders[part[1:]] if part.startswith("@") else part for part in argv]
    assert main(["inspect", *given]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert all(part in line for part in parts), line
