"""`attn_implementation="adala"` on stock models: what becomes linear, what is refused, and the values."""

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
from transformers.masking_utils import causal_mask_function

from modeling_adala import AdaLAViTConfig, AdaLAViTModel, UsageError, build_feature_map, linear_attention_reference
from modeling_adala.attention_interface import adala_attention_forward, adala_attention_mask
from modeling_adala.inspection.check_linear import LinearReport, check_linear

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = TINY | {"image_size": 32, "patch_size": 8}
TEXT = TINY | {"vocab_size": 99, "max_position_embeddings": 16}
MAE_DECODER = {f"decoder_{name}": value for name, value in TINY.items()}
DPT_NECK = {"backbone_out_indices": [0, 1, 1, 1], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
VJEPA = {"crop_size": 32, "patch_size": 8, "frames_per_clip": 4, "pred_num_mask_tokens": 1}
VJEPA |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VJEPA |= {"pred_hidden_size": 32, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
SEGFORMER = {"hidden_sizes": [16] * 4, "depths": [1] * 4, "num_attention_heads": [2] * 4, "decoder_hidden_size": 8}
SAM = {"output_channels": 8, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [1]}

DISPATCHING = {
    "vit": hf.ViTConfig(**IMAGE),
    "deit": hf.DeiTConfig(**IMAGE),
    "vit_mae": hf.ViTMAEConfig(**IMAGE, **MAE_DECODER),
    "vit_msn": hf.ViTMSNConfig(**IMAGE),
    "ijepa": hf.IJepaConfig(**IMAGE),
    "yolos": hf.YolosConfig(**IMAGE | {"image_size": [32, 48]}, num_detection_tokens=3),
    "dinov2": hf.Dinov2Config(**IMAGE),
    "dinov2_with_registers": hf.Dinov2WithRegistersConfig(**IMAGE),
    "dinov3_vit": hf.DINOv3ViTConfig(**IMAGE),
    "dpt": hf.DPTConfig(**IMAGE, **DPT_NECK, is_hybrid=False),
    "clip": hf.CLIPVisionConfig(**IMAGE),
    "videomae": hf.VideoMAEConfig(**IMAGE, num_frames=4),
    "vivit": hf.VivitConfig(**IMAGE, num_frames=4, tubelet_size=[2, 8, 8]),
    "vjepa2": hf.VJEPA2Config(**VJEPA),
    "segformer": hf.SegformerConfig(**SEGFORMER),
    "beit without bias": hf.BeitConfig(**IMAGE),
}


def adala(config, implementation="adala"):
    """A randomly initialized stock model, in eval mode."""
    return AutoModel.from_config(config, attn_implementation=implementation).eval()


def clip(implementation) -> hf.CLIPModel:
    config = hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16)
    return hf.CLIPModel._from_config(config, attn_implementation=implementation)


# --- what the report says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DISPATCHING)
def test_families_that_dispatch_become_linear(family):
    model = adala(DISPATCHING[family])
    report = check_linear(model)
    assert report.is_linear
    layers = {name: module for name, module in model.named_modules() if name in report.linear}
    assert len(layers) == len(report.linear) >= 2
    assert all(hasattr(module, "is_causal") for module in layers.values())  # the modules that called the interface
    assert set(report.linear.values()) == {"EluFeatureMap"}
    assert report.softmax == {}
    assert report.not_run == []
    report.raise_if_softmax()


@pytest.mark.parametrize("name", ["OwlViT", "Blip2"])
def test_vision_towers_that_auto_model_does_not_know(name):
    config = getattr(hf, f"{name}VisionConfig")(**IMAGE)
    model = getattr(hf, f"{name}VisionModel")._from_config(config, attn_implementation="adala")
    assert check_linear(model).is_linear
    with pytest.raises(UsageError, match=rf"AutoModel does not build {name}VisionConfig.*pass that"):
        check_linear(config)


@pytest.mark.parametrize(
    "config",
    [
        hf.SiglipVisionConfig(**IMAGE),
        hf.Siglip2VisionConfig(**TINY, patch_size=8, num_patches=16),
    ],
    ids=["siglip", "siglip2"],
)
def test_the_pooling_head_of_siglip_is_named_as_softmax(config):
    report = check_linear(config)
    assert list(report.linear) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert list(report.softmax) == ["head.attention"]
    assert "nn.MultiheadAttention" in report.softmax["head.attention"]
    assert not report.is_linear
    with pytest.raises(UsageError, match=r"not all linear.*head\.attention: nn\.MultiheadAttention"):
        report.raise_if_softmax()


@pytest.mark.parametrize("text", ["sdpa", "eager"])
def test_a_text_tower_on_softmax_is_reported_with_its_implementation(text):
    report = check_linear(clip({"vision_config": "adala", "text_config": text}))
    assert {name.split(".")[0] for name in report.linear} == {"vision_model"}
    assert report.softmax == {
        f"text_model.encoder.layers.{layer}.self_attn": f"attn_implementation='{text}'" for layer in (0, 1)
    }


def test_vision_tower_of_a_vision_language_model():
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**IMAGE),
        text_config=hf.LlamaConfig(**TEXT | {"max_position_embeddings": 64}),
        image_token_index=90,
    )
    towers = {"vision_config": "adala", "text_config": "sdpa"}
    model = hf.LlavaForConditionalGeneration._from_config(config, attn_implementation=towers)
    tokens = torch.tensor([[1] + [90] * 16 + [2]])
    report = check_linear(model, input_ids=tokens, pixel_values=torch.randn(1, 3, 32, 32))
    assert len(report.linear) == len(report.softmax) == 2
    assert all("vision_tower" in name for name in report.linear)
    with pytest.raises(UsageError, match=r"no inputs could be made up for Llava.*image tokens.*check_linear\(model, "):
        check_linear(model)
    assert check_linear(model.model.vision_tower).is_linear


def test_softmax_on_purpose_and_an_own_feature_map():
    model = AdaLAViTModel(AdaLAViTConfig(**IMAGE, feature_map="hedgehog", softmax_layers=[1]))
    report = check_linear(model)
    assert report.linear == {"layers.0.attention": "HedgehogFeatureMap"}
    assert "on purpose" in report.softmax["layers.1.attention"]
    stock = adala(DISPATCHING["vit"])
    stock.layers[0].attention.feature_map = build_feature_map("relu", 2, 16)
    assert check_linear(stock).linear == {
        "layers.0.attention": "ReluFeatureMap",
        "layers.1.attention": "EluFeatureMap",
    }


def test_attention_that_the_forward_pass_does_not_reach_is_named():
    model = adala(DISPATCHING["vjepa2"])
    report = check_linear(model, torch.randn(1, 4, 3, 32, 32), skip_predictor=True)
    assert report.not_run == ["predictor.layer.0.attention"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_softmax_model_is_reported_and_not_refused(implementation):
    report = check_linear(adala(DISPATCHING["vit"], implementation))
    assert report.linear == {}
    assert set(report.softmax.values()) == {f"attn_implementation='{implementation}'"}


def test_a_model_without_attention_is_not_linear():
    report = check_linear(hf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=32))
    assert not report.is_linear
    with pytest.raises(UsageError, match=r"ConvNextModel is not all linear.*no attention module"):
        report.raise_if_softmax()


def test_the_table_has_one_line_for_all_layers_of_a_kind():
    softmax = {f"text.layers.{layer}.attn": "attn_implementation='sdpa'" for layer in range(12)}
    report = LinearReport("M", {"vision.0.attn": "E", "vision.1.attn": "E"}, softmax, ["head.attn"])
    assert str(report).splitlines() == [
        "M: 2 of 14 attention modules are linear",
        "  linear   vision.*.attn       x2   E",
        "  softmax  text.layers.*.attn  x12  attn_implementation='sdpa'",
        "  not run  head.attn           x1",
    ]


def test_checking_leaves_the_model_and_the_library_as_they_were():
    model = adala(DISPATCHING["vit"])
    model.train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    interfaces = dict(AttentionInterface._global_mapping)
    check_linear(model)
    with pytest.raises(ValueError, match="unpack"):  # the user's own inputs: the model's own error
        check_linear(model, torch.randn(3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert AttentionInterface._global_mapping == interfaces
    assert AttentionInterface._global_mapping["adala"] is adala_attention_forward
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_takes_no_images_is_told_so():
    spectrogram = hf.ASTConfig(**TINY, max_length=32, num_mel_bins=32)
    with pytest.raises(UsageError, match=r"no inputs could be made up for ASTModel \(its forward takes input_values"):
        check_linear(spectrogram)


# --- refused by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (hf.VitDetConfig(**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}), "encoder.layer.0.attention"),
        (hf.TimesformerConfig(**IMAGE, num_frames=2), "encoder.layer.0.temporal_attention.attention"),
    ],
    ids=["vitdet", "timesformer"],
)
def test_families_that_ignore_the_name_are_refused(config, layer):
    with pytest.raises(UsageError, match=rf"^{config.model_type}: {layer} \(and .* attends by itself.*'sdpa'"):
        check_linear(config)


@pytest.mark.parametrize("how", ["built", "set"])
def test_blip_is_refused_however_it_was_asked(how):
    config = hf.BlipVisionConfig(**IMAGE)
    if how == "built":
        model = hf.BlipVisionModel._from_config(config, attn_implementation="adala")
    else:
        model = hf.BlipVisionModel(config)
        model.set_attn_implementation("adala")
    with pytest.raises(UsageError, match=r"blip_vision_model: encoder\.layers\.0\.self_attn .*BlipAttention attends"):
        check_linear(model)


@pytest.mark.parametrize("how", ["configuration", "set"])
@pytest.mark.parametrize("family", ["sam_vision_model", "data2vec-vision"])
def test_families_that_reject_the_name_are_refused(family, how):
    config = hf.SamVisionConfig(**IMAGE, **SAM) if family == "sam_vision_model" else hf.Data2VecVisionConfig(**IMAGE)
    if how == "configuration":
        with pytest.raises(UsageError, match=rf"^{family} takes its attention modules from a fixed table"):
            check_linear(config)
    else:
        model = AutoModel.from_config(config)
        model.set_attn_implementation("adala")
        with pytest.raises(
            UsageError, match=rf"^{family}: .*SelfAttention attends by itself|Sdpa.* attends by itself"
        ):
            check_linear(model)


@pytest.mark.parametrize("std", [0.0, 1.0])  # zero is how the library initializes it
@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (hf.BeitConfig(**IMAGE, use_relative_position_bias=True), r"layers\.0\.attention"),
        (
            hf.SwinConfig(embed_dim=16, depths=[2], num_heads=[2], window_size=2, image_size=32),
            r"encoder\.layers\.0\.blocks\.0\.attention",
        ),
    ],
    ids=["beit", "swin"],
)
def test_relative_position_bias_is_refused(config, layer, std):
    model = adala(config)
    for name, parameter in model.named_parameters():
        if "relative_position_bias" in name:
            nn.init.normal_(parameter, std=std)
    with pytest.raises(
        UsageError, match=rf"{config.model_type}: {layer}: .*shape \(.*, 2, .*bias.*cannot honor.*sdpa"
    ):
        check_linear(model)
    with pytest.raises(UsageError, match=r"(Beit|Swin)Attention is given an attention_mask"):
        model(torch.randn(1, 3, 32, 32))


def test_pixtral_is_refused_for_packed_images_and_linear_for_one():
    model = adala(hf.PixtralVisionConfig(**IMAGE))
    with pytest.raises(
        UsageError, match=r"pixtral: transformer\.layers\.0\.attention: .*\(1, 1, 32, 32\).*block mask"
    ):
        check_linear(model)
    pixels = torch.randn(2, 3, 32, 32)
    with pytest.raises(UsageError, match="PixtralAttention is given an attention_mask"):
        model(pixels)
    assert check_linear(model, pixels[:1]).is_linear


def test_causal_text_is_refused_with_the_way_out():
    with pytest.raises(UsageError, match=r"clip: text_model: CLIPTextConfig asks for a causal.*'text_config': 'sdpa'"):
        check_linear(clip("adala"))


# --- the values: a stock model equals itself under the quadratic reference -------------------------------------------


def reference_attention(module, query, key, value, attention_mask=None, **kwargs):
    """The oracle as an attention interface."""
    heads = build_feature_map("elu", query.shape[1], query.shape[-1])
    assert attention_mask is None or attention_mask.dtype == torch.bool
    return linear_attention_reference(query, key, value, heads, attention_mask).transpose(1, 2).contiguous(), None


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "reference", reference_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "reference", adala_attention_mask)


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3_vit", "clip", "videomae", "dpt", "ijepa"])
@torch.no_grad()
def test_a_stock_model_computes_what_the_reference_computes(family, reference):
    config = DISPATCHING[family]
    shape = (2, 4, 3, 32, 32) if family == "videomae" else (2, 3, 32, 32)
    pixels, outputs = torch.randn(shape), {}
    model = adala(config).double()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # the library's small initial weights would make every attention nearly uniform
            nn.init.normal_(parameter, std=0.3)
    for implementation in ("adala", "reference", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs[implementation] = model(pixels.double()).last_hidden_state
    torch.testing.assert_close(outputs["adala"], outputs["reference"], rtol=1e-9, atol=1e-9)
    assert (outputs["adala"] - outputs["sdpa"]).abs().max() > 1e-6


@torch.no_grad()
def test_the_padding_of_siglip2_reaches_a_stock_model():
    model = adala(hf.Siglip2VisionConfig(**TINY, patch_size=8, num_patches=16, vision_use_head=False))
    pixels = torch.randn(2, 16, 3 * 8 * 8)
    shapes, mask = torch.tensor([[2, 3], [4, 4]]), torch.ones(2, 16, dtype=torch.long)
    mask[0, 6:] = 0
    batch = model(pixels, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
    alone = model(pixels[:1, :6], pixel_attention_mask=mask[:1, :6], spatial_shapes=shapes[:1]).last_hidden_state
    torch.testing.assert_close(batch[:1, :6], alone, rtol=1e-5, atol=1e-5)


# --- what the interface honors, and what it refuses ------------------------------------------------------------------


class Attention(nn.Module):
    """A stock attention module, as far as an attention interface sees it."""

    is_causal = False


def heads_view(heads: int, tokens: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, tokens, heads, 16, dtype=torch.float64).transpose(1, 2)


def expected(query, key, value, mask=None) -> torch.Tensor:
    return linear_attention_reference(query, key, value, build_feature_map("elu", 4, 16), mask).transpose(1, 2)


KEEP = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "mask",
    [
        KEEP,
        KEEP.long(),
        KEEP.float(),
        KEEP[:, None, None],
        KEEP[:, None, None].int(),
        torch.where(KEEP, 0.0, LOWEST)[:, None, None],
        torch.where(KEEP, 0.0, float("-inf"))[:, None, None],
        torch.where(KEEP, 0.0, -10_000.0).to(torch.bfloat16)[:, None, None],
    ],
    ids=["2d bool", "2d int", "2d float", "4d bool", "4d int", "4d lowest", "4d inf", "4d bert"],
)
@pytest.mark.parametrize("keeps_softmax", [False, True])
def test_every_form_of_key_padding_mask_means_the_same(mask, keeps_softmax):
    query, key, value = (heads_view(4, 6) for _ in range(3))
    module, truth = Attention(), expected(query, key, value, KEEP)
    if keeps_softmax:
        module.feature_map = None
        scores = (query @ key.transpose(2, 3) * 0.5).masked_fill(~KEEP[:, None, None], float("-inf"))
        truth = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    output, _ = adala_attention_forward(module, query, key, value, mask, scaling=0.5)
    torch.testing.assert_close(output, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("keeps_softmax", [False, True])
def test_grouped_key_and_value_heads_serve_their_queries(groups, keeps_softmax):
    query, key, value = heads_view(4, 5), heads_view(4 // groups, 6), heads_view(4 // groups, 6)
    module = Attention()
    if keeps_softmax:
        module.feature_map = None
    output, weights = adala_attention_forward(module, query, key, value, KEEP, output_attentions=True)
    repeated = [x.repeat_interleave(groups, dim=1) for x in (key, value)]
    truth = weights @ repeated[1] if keeps_softmax else expected(query, *repeated, KEEP).transpose(1, 2)
    torch.testing.assert_close(output.transpose(1, 2), truth, rtol=1e-6, atol=1e-6)
    assert weights.shape == (2, 4, 5, 6)


def test_queries_may_be_shared_by_the_batch_and_differ_in_number():
    query, key, value = heads_view(4, 3, batch=1), heads_view(4, 6), heads_view(4, 6)
    output, _ = adala_attention_forward(Attention(), query, key, value)
    torch.testing.assert_close(output, expected(query.expand(2, -1, -1, -1), key, value), rtol=1e-9, atol=1e-9)


def test_a_mask_of_zeros_for_every_pair_is_none_at_all_unless_it_is_learned():
    query, key, value = (heads_view(4, 6) for _ in range(3))
    zeros = torch.zeros(2, 1, 6, 6)
    output, _ = adala_attention_forward(Attention(), query, key, value, zeros)
    torch.testing.assert_close(output, expected(query, key, value), rtol=1e-9, atol=1e-9)
    with pytest.raises(UsageError, match="bias"):
        adala_attention_forward(Attention(), query, key, value, zeros.requires_grad_())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.randn(2, 1, 6, 6), r"shape \(2, 1, 6, 6\), a bias"),
        (torch.zeros(1, 4, 6, 6), r"shape \(1, 4, 6, 6\), a bias"),
        (torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6), r"block mask"),
        (torch.zeros(2, 6, 6), r"shape \(2, 6, 6\)"),
        (torch.ones(2, 5), r"of 6 keys"),
        (torch.ones(2, 1), r"of 6 keys"),
        (torch.randn(2, 1, 1, 6), "float32 that is a bias"),
        (torch.where(KEEP, 0.0, LOWEST), "float32 that is a bias"),  # additive, where 1 and 0 are the convention
    ],
)
@pytest.mark.parametrize("keeps_softmax", [False, True])
def test_other_masks_are_refused(mask, message, keeps_softmax):
    query, key, value = (heads_view(4, 6) for _ in range(3))
    module = Attention()
    if keeps_softmax:
        module.feature_map = None
    with pytest.raises(UsageError, match=rf"^Attention is given an attention_mask .*{message}.*'sdpa'"):
        adala_attention_forward(module, query, key, value, mask)


@pytest.mark.parametrize(
    "argument",
    ["position_bias", "softcap", "s_aux", "sliding_window", "cu_seq_lens_q", "indices", "block_indices"],
)
def test_arguments_that_change_the_softmax_are_refused(argument):
    query, key, value = (heads_view(4, 6) for _ in range(3))
    output, _ = adala_attention_forward(Attention(), query, key, value, **{argument: None})
    torch.testing.assert_close(output, expected(query, key, value), rtol=1e-9, atol=1e-9)
    for given in (3, torch.zeros(4)):
        with pytest.raises(UsageError, match=f"Attention is given {argument}, which linear attention cannot honor"):
            adala_attention_forward(Attention(), query, key, value, **{argument: given})


@pytest.mark.parametrize("how", ["argument", "attribute", "nothing said"])
def test_causal_attention_is_refused(how):
    query, key, value = (heads_view(4, 6) for _ in range(3))
    module = nn.Identity() if how == "nothing said" else Attention()
    module.is_causal = {"argument": False, "attribute": True}.get(how, True)
    if how == "nothing said":
        del module.is_causal  # then "sdpa" is causal, too
    with pytest.raises(UsageError, match="attends causally"):
        adala_attention_forward(module, query, key, value, is_causal=True if how == "argument" else None)
    if how != "argument":  # a mask says who sees whom, and the argument goes before the attribute
        for given in ({"attention_mask": KEEP}, {"is_causal": False}):
            adala_attention_forward(module, query, key, value, **given)


def test_mask_function_refuses_all_but_padding():
    with pytest.raises(UsageError, match=r"ViTConfig asks for a causal, window or block mask.*'sdpa'"):
        adala_attention_mask(2, 6, 6, mask_function=causal_mask_function, config=hf.ViTConfig())
    with pytest.raises(UsageError, match="block mask"):
        adala_attention_mask(2, 6, 6, mask_function=lambda batch, head, query, key: query // 3 == key // 3)
