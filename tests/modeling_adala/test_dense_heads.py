"""AdaLA backbones under the dense heads of Transformers, and AdaLA's own segmentation head.

What runs, trains and comes back from disk, with the backbone really linear:

- `UperNetForSemanticSegmentation`, `Mask2FormerForUniversalSegmentation`: every family.
- `DPTForDepthEstimation`, `DepthAnythingForDepthEstimation`: the families with exactly one token before the patches
  (ViT, DINOv2, CLIP). Their necks take token sequences and cut off the first token, whatever it is: with the two of
  DeiT and with registers too many are left, with I-JEPA, SigLIP and SigLIP 2 a patch is lost, and `DINOv3ViTBackbone`
  delivers no class token. They fail on the shape, as with the stock backbones of DINOv2 with registers and of DINOv3.
  Neither computes a loss ("Training is not implemented yet"): the loss here is the test's.
- `EomtForUniversalSegmentation` has no place for a backbone: its encoder is its own. It takes
  `attn_implementation="adala"` without masked attention only (`eval()` and `attn_mask_probs` of 0, in which it can
  still take gradient steps). In training mode every query has a mask of its own, which is refused by name.
"""

import pytest
import torch
from family_helpers import HEAD, lost_keys, randomize, stock_model, tiny_config
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from torch.nn import functional as F
from training_helpers import assert_same_tensors
from transformers import (
    AutoBackbone,
    AutoModelForSemanticSegmentation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Backbone,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    EomtConfig,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_adala import UsageError
from modeling_adala.inspection.check_linear import check_linear
from modeling_adala.inspection.towers import attention_modules, vision_tower
from modeling_adala.mixins import last_layernorm, num_special_tokens
from modeling_adala.modeling_adala import MODELS

BACKBONES = [name for name, family in MODELS.items() if "Backbone" in family]
ONE_TOKEN = [name for name in BACKBONES if name in ("vit", "dinov2", "clip_vision_model")]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
LABELS = 4
SIZE = (32, 48)
every_backbone = pytest.mark.parametrize("name", BACKBONES)


def config_of(name: str, **options):
    return tiny_config(MODELS[name]["Model"].config_class, num_hidden_layers=4, **options)


def upernet(name: str) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_channels": 16, "auxiliary_in_channels": 32}
    backbone = config_of(name, out_features=STAGES)
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=LABELS, **sizes))


def mask2former(name: str) -> PreTrainedModel:
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward"), 32)
    sizes |= {"encoder_feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    backbone = config_of(name, out_features=STAGES)
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=backbone, num_queries=5, train_num_points=20, num_labels=LABELS, **sizes)
    )


def dpt(name: str) -> PreTrainedModel:
    backbone = config_of(name, out_features=STAGES, reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 16, "hidden_size": 32}
    return DPTForDepthEstimation(DPTConfig(backbone_config=backbone, **sizes))


def depth_anything(name: str) -> PreTrainedModel:
    backbone = config_of(name, out_features=STAGES, reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 16, "head_hidden_size": 8}
    config = DepthAnythingConfig(backbone_config=backbone, patch_size=8, reassemble_hidden_size=32, **sizes)
    return DepthAnythingForDepthEstimation(config)


HEADS = [
    *((upernet, name) for name in BACKBONES),
    *((mask2former, name) for name in BACKBONES),
    *((build, name) for build in (dpt, depth_anything) for name in ONE_TOKEN),
]


def loss_of(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    if isinstance(model, (Mask2FormerForUniversalSegmentation, EomtForUniversalSegmentation)):
        masks = [(torch.arange(pixels[0, 0].numel()).reshape(pixels.shape[2:]) % 7 == i).float() for i in range(2)]
        masks, classes = [torch.stack(masks)] * len(pixels), [torch.tensor([0, 2])] * len(pixels)
        return model(pixels, mask_labels=masks, class_labels=classes).loss.sum()
    if isinstance(model, UperNetForSemanticSegmentation):
        return model(pixels, labels=torch.randint(LABELS, (len(pixels), *pixels.shape[2:]))).loss
    return (model(pixels).predicted_depth - 1).square().mean()


def maps_of(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """What the head says."""
    output = model.eval()(pixels)
    names = ("logits", "predicted_depth", "masks_queries_logits")
    return next(output[name] for name in names if output.get(name) is not None)


# --- heads of Transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "name"), HEADS, ids=lambda value: getattr(value, "__name__", value))
def test_a_stock_head_runs_trains_and_comes_back_with_its_backbone_linear(build, name, tmp_path):
    model = build(name)
    pixels = torch.randn(2, 3, *SIZE)
    backbone = getattr(model, "backbone", None) or model.model.pixel_level_module.encoder
    assert type(backbone) is MODELS[name]["Backbone"]
    with torch.no_grad():
        before = maps_of(model, pixels)
    assert before.shape[0] == 2 and before.isfinite().all()

    model.train()
    maps = {f"{i}.{key}": p for i, m in enumerate(attention_modules(backbone)) for key, p in m.named_parameters()}
    start = {key: parameter.detach().clone() for key, parameter in maps.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, pixels).backward()
    optimizer.step()
    still = [key for key in maps if torch.equal(maps[key], start[key]) and "k_proj.bias" not in key]
    assert not still

    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        after = maps_of(model, pixels)
        assert (after - before).abs().max() > 1e-4
        # convolutions may round otherwise with weights mapped from a file
        torch.testing.assert_close(maps_of(again, pixels), after, rtol=0, atol=1e-6)
    assert_same_tensors(again.state_dict(), model.state_dict())
    # what ran, and not what the configuration says
    linear = check_linear(again, pixels).linear
    names = {module: key for key, module in again.named_modules()}
    inner = getattr(again, "backbone", None) or again.model.pixel_level_module.encoder
    assert {names[module] for module in attention_modules(inner)} <= set(linear)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in ONE_TOKEN])
@pytest.mark.parametrize("build", [dpt, depth_anything])
def test_depth_heads_refuse_backbones_without_exactly_one_special_token(build, name):
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        build(name)(torch.randn(1, 3, *SIZE))


def test_eomt_is_linear_without_masked_attention_and_refused_with_it(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = EomtConfig(**sizes, num_blocks=1, num_queries=5, num_upscale_blocks=1, num_labels=LABELS)
    config.train_num_points = 20
    model = EomtForUniversalSegmentation._from_config(config, attn_implementation="adala")
    pixels = torch.randn(2, 3, 32, 32)
    with pytest.raises(UsageError, match=r"EomtAttention.*cannot honor"):
        model.train()(pixels)
    with torch.no_grad():
        model.attn_mask_probs.zero_()
    assert check_linear(model.eval(), pixels).is_linear
    start = model.layers[0].attention.q_proj.weight.detach().clone()
    loss_of(model, pixels).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    assert not torch.equal(model.layers[0].attention.q_proj.weight, start)
    model.save_pretrained(tmp_path)
    again = EomtForUniversalSegmentation.from_pretrained(tmp_path, attn_implementation="adala")
    with torch.no_grad():
        assert torch.equal(maps_of(again, pixels), maps_of(model, pixels))


# --- backbones -------------------------------------------------------------------------------------------------------


@every_backbone
@torch.no_grad()
def test_backbones_open_from_a_folder_by_their_auto_class(name, tmp_path):
    model = randomize(AutoBackbone.from_config(config_of(name)))
    model.save_pretrained(tmp_path)
    opened = AutoBackbone.from_pretrained(tmp_path, out_indices=[1, 3])
    assert type(opened) is MODELS[name]["Backbone"] and opened.out_indices == [1, 3]
    pixels = torch.randn(1, 3, *SIZE)
    expected = model.eval()(pixels, output_hidden_states=True).hidden_states
    for ours, theirs in zip(opened.eval()(pixels, output_hidden_states=True).hidden_states, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_other_backbones_open_as_transformers_does(monkeypatch, tmp_path):
    """Which asks the Hub for each, even for a folder."""
    Dinov2Backbone(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    for name, error in ((str(tmp_path), HFValidationError), ("resnet18", OfflineModeIsEnabled)):
        with pytest.raises(error):
            AutoBackbone.from_pretrained(name)


@pytest.mark.parametrize("reshape", [True, False], ids=["maps", "tokens"])
@pytest.mark.parametrize("layernorm", [True, False], ids=["normalized", "raw"])
@every_backbone
@torch.no_grad()
def test_backbones_behave_as_dinov2s(name, layernorm, reshape):
    config = config_of(
        name, out_features=["stem", "stage2", "stage4"], apply_layernorm=layernorm, reshape_hidden_states=reshape
    )
    torch.manual_seed(0)
    model = randomize(AutoBackbone.from_config(config))
    assert type(model) is MODELS[name]["Backbone"]
    assert all(module.config._attn_implementation == "adala" for module in attention_modules(model))
    assert model.out_features == ["stem", "stage2", "stage4"] and model.out_indices == [0, 2, 4]
    assert model.channels == [32, 32, 32]

    output = model(torch.randn(2, 3, *SIZE), output_hidden_states=True)
    assert len(output.hidden_states) == 5 and len(output.feature_maps) == 3
    for stage, feature_map in zip((0, 2, 4), output.feature_maps):
        expected = output.hidden_states[stage]
        if layernorm or (name == "dinov3_vit" and stage == 4):  # so does the stock class
            expected = last_layernorm(model)(expected)
        if reshape or name == "dinov3_vit":  # which leaves the special tokens out of both forms
            expected = expected[:, num_special_tokens(config) :]
        if reshape:
            expected = expected.unflatten(1, (4, 6)).permute(0, 3, 1, 2)
        assert torch.equal(feature_map, expected)
    assert model(torch.randn(1, 3, *SIZE)).hidden_states is None


@every_backbone
@torch.no_grad()
def test_stages_are_chosen_by_index_too_and_the_last_is_the_default(name):
    pixels, models = torch.randn(1, 3, *SIZE), []
    for options in ({}, {"out_indices": [4]}, {"out_indices": [-1]}, {"out_features": ["stage4"]}):
        torch.manual_seed(0)
        models.append(randomize(AutoBackbone.from_config(config_of(name, **options))))
    first, *others = [model(pixels).feature_maps for model in models]
    assert len(first) == 1 and first[0].shape == (1, 32, 4, 6)
    assert all(len(maps) == 1 and torch.equal(maps[0], first[0]) for maps in others)
    with pytest.raises(ValueError, match="stage9"):
        config_of(name, out_features=["stage9"])


# --- AdaLA's segmentation head ---------------------------------------------------------------------------------------


def segmenter(name: str, **options) -> PreTrainedModel:
    config = config_of(name, num_labels=LABELS, **options)
    torch.manual_seed(0)
    return randomize(AutoModelForSemanticSegmentation.from_config(config))


@every_backbone
def test_the_segmentation_loss_is_cross_entropy_on_upsampled_scores(name):
    model = segmenter(name, out_indices=[2, 4])
    assert type(model) is MODELS[name]["ForSemanticSegmentation"]
    assert model.classifier.weight.shape == (LABELS, 2 * 32, 1, 1)
    pixels, labels = torch.randn(2, 3, *SIZE), torch.randint(LABELS, (2, 30, 50))  # at a resolution of their own
    labels[0, :20] = model.config.semantic_loss_ignore_index
    output = model(pixels, labels=labels)
    assert output.logits.shape == (2, LABELS, 4, 6)
    scores = F.interpolate(output.logits, (30, 50), mode="bilinear", align_corners=False)
    rows = scores.permute(0, 2, 3, 1)[labels != 255].log_softmax(dim=-1)
    by_hand = -rows[torch.arange(len(rows)), labels[labels != 255]].mean()
    torch.testing.assert_close(output.loss, by_hand)
    counted = labels.masked_fill(labels == 255, 0)
    assert (model(pixels, labels=counted).loss - output.loss).abs() > 1e-3

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        model.train()(pixels, labels=labels).loss.backward()
        optimizer.step()
    assert model.eval()(pixels, labels=labels).loss < output.loss
    assert model.batch_norm.num_batches_tracked == 5


@every_backbone
@torch.no_grad()
def test_the_segmenter_opens_base_models_and_itself(name, tmp_path):
    """A base model may be the stock teacher or a linear student; only the head is new."""
    stock_model(name).save_pretrained(tmp_path / "stock")
    student = MODELS[name]["Model"].from_pretrained(tmp_path / "stock")
    student.save_pretrained(tmp_path / "student")
    auto = AutoModelForSemanticSegmentation
    model, info = auto.from_pretrained(tmp_path / "student", num_labels=LABELS, output_loading_info=True)
    assert not lost_keys(info, *HEAD)
    assert not any(".feature_map." in key for key in info["missing_keys"])
    assert {key for key in info["missing_keys"] if key.startswith(HEAD)}
    weights, theirs = vision_tower(model).state_dict(), student.state_dict()
    assert not [key for key in weights if not torch.equal(weights[key], theirs[key])]
    randomize(model).save_pretrained(tmp_path / "segmenter")
    pixels = torch.randn(1, 3, *SIZE)
    again = auto.from_pretrained(tmp_path / "segmenter")
    assert torch.equal(again(pixels).logits, model(pixels).logits)
