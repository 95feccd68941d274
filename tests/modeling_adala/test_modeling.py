"""AdaLA models beside the stock ones: equal in softmax mode, ordinary Transformers models in all other respects."""

import json
from inspect import signature
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    BitImageProcessorPil,
    Dinov2Backbone,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessorPil,
    ViTModel,
)

from modeling_adala import (
    AdaLADinov2Backbone,
    AdaLADinov2Config,
    AdaLADinov2ForImageClassification,
    AdaLADinov2Model,
    AdaLAViTConfig,
    AdaLAViTForImageClassification,
    AdaLAViTForMaskedImageModeling,
    AdaLAViTModel,
    UsageError,
    attention_map,
    linear_attention_reference,
)
from modeling_adala.attention_interface import is_new_parameter
from modeling_adala.configuration_adala import FEATURE_MAP_OPTIONS
from modeling_adala.feature_maps import FEATURE_MAPS, FeatureMap
from modeling_adala.inspection.towers import attention_modules

# Weights large enough that softmax and linear attention differ far beyond rounding.
SHARED = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
VIT = SHARED | {"intermediate_size": 96, "image_size": 32, "patch_size": 4, "encoder_stride": 4, "num_labels": 5}
DINOV2 = SHARED | {"mlp_ratio": 2, "image_size": 28, "patch_size": 7, "layerscale_value": 1.0, "num_labels": 5}

PAIRS = [
    (ViTModel, AdaLAViTModel),
    (ViTForImageClassification, AdaLAViTForImageClassification),
    (ViTForMaskedImageModeling, AdaLAViTForMaskedImageModeling),
    (Dinov2Model, AdaLADinov2Model),
    (Dinov2ForImageClassification, AdaLADinov2ForImageClassification),
    (Dinov2Backbone, AdaLADinov2Backbone),
]
BASE_PAIRS = [PAIRS[0], PAIRS[3]]
OLD_NAMES = {
    "ViTModel": "encoder.layer.0.attention.attention.query.weight",
    "ViTForImageClassification": "vit.encoder.layer.0.attention.attention.query.weight",
    "ViTForMaskedImageModeling": "vit.encoder.layer.0.attention.attention.query.weight",
    "Dinov2Model": "encoder.layer.0.attention.attention.query.weight",
    "Dinov2ForImageClassification": "dinov2.encoder.layer.0.attention.attention.query.weight",
    "Dinov2Backbone": "encoder.layer.0.attention.attention.query.weight",
}


def make(model_class, **options):
    """A small model in eval mode in which no parameter, biases included, has a special value."""
    values = (VIT if "ViT" in model_class.__name__ else DINOV2) | options
    if "Backbone" in model_class.__name__:
        values |= {"out_features": ["stage1", "stage3"]}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not is_new_parameter(name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def with_weights_of(teacher, student_class, **options):
    student = make(student_class, **options)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert unexpected == []
    assert all(is_new_parameter(name) for name in missing)
    return student


def pixels(model, batch: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    return torch.randn(batch, 3, *(size or (model.config.image_size, model.config.image_size)))


def tensors(output) -> list[torch.Tensor]:
    """All tensors of a model output, flat."""
    return [x for value in output.to_tuple() for x in (value if isinstance(value, tuple) else (value,))]


def token_count(model) -> int:
    return 1 + (model.config.image_size // model.config.patch_size) ** 2


# --- parity with the stock models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["native", "rectangular"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("stock_class", "student_class"), PAIRS)
@torch.no_grad()
def test_softmax_mode_equals_the_stock_model(stock_class, student_class, implementation, size):
    if size == "rectangular" and stock_class is ViTForMaskedImageModeling:
        pytest.skip("the stock decoder reshapes to a square")
    teacher = make(stock_class)
    teacher.set_attn_implementation(implementation)
    student = with_weights_of(teacher, student_class)
    patch = teacher.config.patch_size
    inputs = pixels(teacher, size=None if size == "native" else (3 * patch, 7 * patch))
    kwargs = {"interpolate_pos_encoding": True} if size == "rectangular" and "ViT" in stock_class.__name__ else {}
    expected = tensors(teacher(inputs, **kwargs))
    linear = tensors(student(inputs, **kwargs))
    student.set_attn_implementation(implementation)
    actual = tensors(student(inputs, **kwargs))
    assert len(actual) == len(expected) == len(linear) > 0
    for in_softmax_mode, stock, in_linear_mode in zip(actual, expected, linear):
        assert in_softmax_mode.shape == stock.shape
        assert (in_softmax_mode - stock).abs().max() < 1e-5
        assert (in_linear_mode - stock).abs().max() > 1e-2


@torch.no_grad()
def test_masked_image_modeling_loss_equals_the_stock_one_in_softmax_mode():
    teacher = make(ViTForMaskedImageModeling)
    student = with_weights_of(teacher, AdaLAViTForMaskedImageModeling)
    student.set_attn_implementation("sdpa")
    inputs, masked = pixels(teacher), torch.rand(2, 64) < 0.5
    expected = teacher(inputs, bool_masked_pos=masked).loss
    assert abs(student(inputs, bool_masked_pos=masked).loss - expected) < 1e-5
    assert abs(student(inputs, bool_masked_pos=~masked).loss - expected) > 1e-3


@torch.no_grad()
def test_a_hybrid_with_all_layers_softmax_equals_the_stock_model():
    for stock_class, student_class in BASE_PAIRS:
        teacher = make(stock_class)
        student = with_weights_of(teacher, student_class, softmax_layers=[0, 1, 2])
        assert student.config._attn_implementation == "adala"
        inputs = pixels(teacher)
        assert (student(inputs)[0] - teacher(inputs)[0]).abs().max() < 1e-5


@torch.no_grad()
def test_each_layer_of_a_hybrid_is_softmax_or_linear_as_configured():
    """Every attention module is fed the same input and compared with softmax in stock code and linear by hand."""
    model = make(AdaLAViTModel, softmax_layers=[-1, 0], feature_map="elu", local_mixing=0)
    assert model.config.softmax_layers == [0, 2]
    assert model.config.linear_layers == [1]
    hidden = torch.randn(2, 10, 64)
    for layer, attention in enumerate(attention_modules(model)):
        stock = make(ViTModel).layers[0].attention
        stock.load_state_dict(attention.state_dict())
        softmax = stock(hidden)[0]
        query, key, value = (
            projection(hidden).view(2, 10, 4, 16).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        plain = make(AdaLAViTModel, feature_map="elu", local_mixing=0).layers[0].attention.feature_map
        linear = linear_attention_reference(query, key, value, plain).transpose(1, 2).reshape(2, 10, 64)
        linear = attention.o_proj(linear)
        assert (softmax - linear).abs().max() > 1e-2
        output = attention(hidden)[0]
        assert (output - (linear if layer == 1 else softmax)).abs().max() < 1e-5
        assert (attention.feature_map is None) == (layer != 1)


# --- opening stock checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", ["elu", "hedgehog", "t2r"])
@pytest.mark.parametrize(("stock_class", "student_class"), PAIRS)
def test_opens_stock_checkpoints_from_their_old_names_on_disk(stock_class, student_class, feature_map, tmp_path):
    teacher = make(stock_class)
    teacher.save_pretrained(tmp_path)
    assert OLD_NAMES[stock_class.__name__] in load_file(tmp_path / "model.safetensors")
    student, info = student_class.from_pretrained(tmp_path, feature_map=feature_map, output_loading_info=True)
    learned = {name for name in student.state_dict() if is_new_parameter(name)}
    assert set(info["missing_keys"]) == learned
    assert len(learned) == (1 + {"elu": 0, "hedgehog": 2, "t2r": 4}[feature_map]) * 3
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    weights = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    for name in learned:
        zeros = torch.zeros(64, 1, 3, 3) if ".local_mixing." in name else torch.zeros(4, 1, 16)
        neutral = torch.eye(16).expand(4, 16, 16) if ".weight_" in name else zeros
        assert torch.equal(weights[name], neutral), name
    assert student.config.teacher_name_or_path == str(tmp_path)
    assert student.config.model_type.startswith("adala_")
    assert student.config._attn_implementation == "adala"


def test_opens_a_checkpoint_of_another_head(tmp_path):
    teacher = make(ViTForImageClassification)
    teacher.save_pretrained(tmp_path / "classifier")
    model, info = AdaLAViTModel.from_pretrained(
        tmp_path / "classifier", add_pooling_layer=False, feature_map="elu", output_loading_info=True
    )
    assert all(is_new_parameter(name) for name in info["missing_keys"])
    assert torch.equal(model.layers[2].attention.q_proj.weight, teacher.vit.layers[2].attention.q_proj.weight)
    make(ViTModel).save_pretrained(tmp_path / "base")
    _, info = AdaLAViTForImageClassification.from_pretrained(
        tmp_path / "base", feature_map="elu", output_loading_info=True
    )
    lost = {name for name in info["missing_keys"] if not is_new_parameter(name)}
    assert lost == {"classifier.weight", "classifier.bias"}


def test_saves_names_as_in_memory(tmp_path):
    """Trainer reloads checkpoints without renaming; old names on disk would leave most tensors untouched."""
    for _, student_class in PAIRS:
        student = make(student_class, feature_map="t2r")
        student.save_pretrained(tmp_path / student_class.__name__)
        saved = load_file(tmp_path / student_class.__name__ / "model.safetensors")
        assert saved.keys() == student.state_dict().keys()


# --- registration and attention implementations ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, AdaLAViTModel),
        (AutoModelForImageClassification, AdaLAViTForImageClassification),
        (AutoModelForMaskedImageModeling, AdaLAViTForMaskedImageModeling),
        (AutoModel, AdaLADinov2Model),
        (AutoModelForImageClassification, AdaLADinov2ForImageClassification),
    ],
)
def test_auto_classes_open_saved_models_linear_by_default(auto_class, model_class, tmp_path):
    make(model_class).save_pretrained(tmp_path)
    model = auto_class.from_pretrained(tmp_path)
    assert type(model) is model_class
    assert model.config._attn_implementation == "adala"
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is model_class.config_class
    assert type(auto_class.from_config(config)) is model_class
    assert auto_class.from_pretrained(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"


def test_auto_backbone_builds_from_a_config():
    model = AutoBackbone.from_config(AdaLADinov2Config(**DINOV2, out_features=["stage2"]))
    assert type(model) is AdaLADinov2Backbone
    assert model.config._attn_implementation == "adala"


@pytest.mark.parametrize(
    ("model_class", "processor_class"),
    [(AdaLAViTModel, ViTImageProcessorPil), (AdaLADinov2Model, BitImageProcessorPil)],
)
def test_auto_image_processor_is_chosen_by_the_model_type(model_class, processor_class, tmp_path):
    make(model_class).save_pretrained(tmp_path)
    processor_class(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings.pop("image_processor_type")  # or that would decide
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor) is processor_class
    assert processor.size["height"] == 32


@torch.no_grad()
def test_set_attn_implementation_switches_the_output_there_and_back():
    for _, student_class in BASE_PAIRS:
        model = make(student_class)
        inputs = pixels(model)
        linear = model(inputs)[0]
        model.set_attn_implementation("sdpa")
        softmax = model(inputs)[0]
        assert (softmax - linear).abs().max() > 1e-2
        model.set_attn_implementation("adala")
        assert torch.equal(model(inputs)[0], linear)


@pytest.mark.parametrize(("stock_class", "student_class"), BASE_PAIRS)
@torch.no_grad()
def test_a_stock_model_takes_the_adala_implementation_and_equals_plain_elu(stock_class, student_class):
    teacher = make(stock_class)
    inputs = pixels(teacher)
    softmax = teacher(inputs)[0]
    student = with_weights_of(teacher, student_class, feature_map="elu")
    teacher.set_attn_implementation("adala")
    linear = teacher(inputs)[0]
    assert (linear - softmax).abs().max() > 1e-2
    assert (linear - student(inputs)[0]).abs().max() < 1e-6


def test_feature_maps_give_different_models():
    inputs = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        outputs = {name: make(AdaLAViTModel, feature_map=name)(inputs)[0] for name in ("elu", "relu", "hedgehog")}
        neutral_t2r = make(AdaLAViTModel, feature_map="t2r")(inputs)[0]
    names = list(outputs)
    for i, first in enumerate(names):
        for second in names[:i]:
            assert (outputs[first] - outputs[second]).abs().max() > 1e-2
    torch.testing.assert_close(neutral_t2r, outputs["relu"], rtol=0, atol=1e-5)  # T2R starts as relu


@torch.no_grad()
def test_a_bfloat16_model_stays_close_to_float32():
    for feature_map in ("elu", "hedgehog"):
        model = make(AdaLADinov2Model, feature_map=feature_map)
        inputs = pixels(model)
        expected = model(inputs)[0]
        output = model.to(torch.bfloat16)(inputs.to(torch.bfloat16))[0]
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected).norm() / expected.norm() < 0.05


# --- configuration ---------------------------------------------------------------------------------------------------

OPTIONS = {
    "feature_map": "hedgehog",
    "feature_map_kwargs": {"feature_dim": 24, "scale": 0.5, "center_keys": True},
    "softmax_layers": [0, -1],
    "teacher_name_or_path": "org/teacher",
    "teacher_revision": "abc123",
    "adala_stage": "feature-alignment",
}


@pytest.mark.parametrize(("config_class", "values"), [(AdaLAViTConfig, VIT), (AdaLADinov2Config, DINOV2)])
def test_config_survives_dict_and_disk(config_class, values, tmp_path):
    config = config_class(**values, **OPTIONS)
    assert config.softmax_layers == [0, 2]
    expected = OPTIONS | {"softmax_layers": [0, 2]}
    config.save_pretrained(tmp_path)
    copies = [
        config_class.from_dict(config.to_dict()),
        config_class.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ]
    for copy in copies:
        assert type(copy) is config_class
        assert copy.hidden_size == 64
        assert {name: getattr(copy, name) for name in OPTIONS} == expected
        assert copy.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in OPTIONS} == expected
    assert written["model_type"] == config_class.model_type


def test_config_diff_holds_what_was_changed_and_rebuilds_the_config():
    config = AdaLAViTConfig(**VIT, **OPTIONS)
    diff = config.to_diff_dict()
    assert {name: diff[name] for name in OPTIONS} == OPTIONS | {"softmax_layers": [0, 2]}
    assert AdaLAViTConfig.from_dict(diff).to_dict() == config.to_dict()
    assert "_attn_implementation" not in diff


def test_config_defaults_are_not_shared_between_configs():
    AdaLAViTConfig().feature_map_kwargs["scale"] = 3
    AdaLAViTConfig().softmax_layers.append(1)
    assert AdaLAViTConfig().feature_map_kwargs == {}
    assert AdaLAViTConfig().softmax_layers == []


def test_feature_map_kwargs_reach_every_linear_layer(tmp_path):
    make(AdaLADinov2Model, **OPTIONS).save_pretrained(tmp_path)
    maps = [module.feature_map for module in attention_modules(AutoModel.from_pretrained(tmp_path))]
    assert maps[0] is None and maps[2] is None
    assert maps[1].weight_q.shape == (4, 16, 24)
    assert maps[1].scale == 0.5
    assert maps[1].center_keys is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_layers": [3]}, "layer 3 does not exist.*layers 0 to 2"),
        ({"softmax_layers": [-4]}, "layer -4 does not exist"),
        ({"feature_map": "gelu"}, "'gelu' is unknown.*elu, hedgehog"),
        (
            {"feature_map": "elu", "feature_map_kwargs": {"feature_dim": 3}},
            "feature_dim.*does not fit feature_map='elu'",
        ),
    ],
)
@pytest.mark.parametrize(("config_class", "values"), [(AdaLAViTConfig, VIT), (AdaLADinov2Config, DINOV2)])
def test_wrong_options_are_usage_errors_when_the_config_is_made(config_class, values, options, message):
    with pytest.raises(UsageError, match=message):
        config_class(**values, **options)


@pytest.mark.parametrize(("layers", "normalized"), [([-1], [2]), ([2, 0, -3], [0, 2]), ([-2, 1], [1]), ([], [])])
def test_softmax_layers_are_counted_from_zero_sorted_and_unique(layers, normalized):
    assert AdaLAViTConfig(**VIT, softmax_layers=layers).softmax_layers == normalized


# --- looking inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("model_class", [AdaLAViTForImageClassification, AdaLADinov2ForImageClassification])
@torch.no_grad()
def test_attentions_sum_to_one_and_times_values_give_the_output_of_each_layer(model_class, masked):
    model = make(model_class, softmax_layers=[1])
    tokens, seen = token_count(model), []
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, tokens // 2 :] = 0
    for module in attention_modules(model):
        module.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output[0])))
    for module in model.modules():
        if hasattr(module, "norm1") or hasattr(module, "layernorm_before"):
            (getattr(module, "norm1", None) or module.layernorm_before).register_forward_hook(
                lambda module, args, output: seen.append(output)
            )
    output = model(pixels(model), output_attentions=True, attention_mask=mask if masked else None)
    attentions = output.attentions
    inputs, outputs = seen[0::2], [entry[-1] for entry in seen[1::2]]
    assert len(attentions) == len(inputs) == len(outputs) == 3
    for module, weights, hidden, expected in zip(attention_modules(model), attentions, inputs, outputs):
        assert weights.shape == (2, 4, tokens, tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, tokens), rtol=0, atol=1e-4)
        if masked:
            assert weights[0, :, :, tokens // 2 :].abs().max() == 0
        value = module.v_proj(hidden).view(2, tokens, 4, 16).transpose(1, 2)
        by_hand = module.o_proj((weights @ value).transpose(1, 2).reshape(2, tokens, 64))
        torch.testing.assert_close(by_hand, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_class", [AdaLAViTModel, AdaLADinov2ForImageClassification])
def test_attention_map_of_linear_and_softmax_layers(model_class):
    model = make(model_class, softmax_layers=[1])
    inputs, tokens = pixels(model), token_count(model)
    with torch.no_grad():
        attentions = model(inputs, output_attentions=True).attentions
    for layer in (0, 1, -1):
        weights = attention_map(model, inputs, layer)
        assert weights.shape == (2, 4, tokens, tokens)
        assert torch.equal(weights, attentions[layer])
    assert (attentions[0].amax() - 1 / tokens).abs() > 1e-3  # not uniform
    with pytest.raises(UsageError, match="layers 0 to"):
        attention_map(model, inputs, 3)
    assert not any(module._forward_hooks_with_kwargs for module in attention_modules(model))  # nothing left behind


def test_attention_map_passes_arguments_on():
    model = make(AdaLAViTModel)
    weights = attention_map(model, torch.randn(1, 3, 16, 48), 0, interpolate_pos_encoding=True)
    assert weights.shape == (1, 4, 1 + 4 * 12, 1 + 4 * 12)


@torch.no_grad()
def test_hidden_states_are_captured():
    for _, student_class in PAIRS[:2] + PAIRS[3:5]:
        model = make(student_class)
        inputs, tokens = pixels(model), token_count(model)
        states = model(inputs, output_hidden_states=True).hidden_states
        assert [tuple(state.shape) for state in states] == [(2, tokens, 64)] * 4
        assert torch.equal(states[0], model.base_model.embeddings(inputs))
        normed = model.base_model.layernorm(states[-1])
        torch.testing.assert_close(normed, model.base_model(inputs).last_hidden_state, rtol=0, atol=1e-6)
        assert (states[1] - states[2]).abs().max() > 1e-2


# --- attention mask --------------------------------------------------------------------------------------------------


def half_masked(model, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask that hides the lower half of every image, and the images with other pixels there."""
    rows = model.config.image_size // model.config.patch_size
    mask = torch.ones(len(inputs), 1 + rows**2, dtype=torch.long)
    mask[:, 1 + rows * (rows // 2) :] = 0
    changed = inputs.clone()
    changed[:, :, (rows // 2) * model.config.patch_size :] = 7.0
    return mask, changed


@pytest.mark.parametrize("softmax_layers", [[], [1], [0, 1, 2]])
@pytest.mark.parametrize("student_class", [AdaLAViTModel, AdaLADinov2Model])
@torch.no_grad()
def test_masked_patches_have_no_influence_on_the_others(student_class, softmax_layers):
    model = make(student_class, softmax_layers=softmax_layers)
    inputs = pixels(model)
    mask, changed = half_masked(model, inputs)
    visible = mask[0].bool()
    unmasked = model(inputs)[0]
    masked = model(inputs, attention_mask=mask)[0]
    assert (masked - unmasked)[:, 0].abs().max() > 1e-2
    assert (model(changed)[0] - unmasked)[:, 0].abs().max() > 1e-2
    torch.testing.assert_close(
        model(changed, attention_mask=mask)[0][:, visible], masked[:, visible], rtol=0, atol=1e-6
    )
    all_visible = torch.ones_like(mask)
    torch.testing.assert_close(model(inputs, attention_mask=all_visible)[0], unmasked, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("stock_class", "student_class"), [*BASE_PAIRS, PAIRS[1], PAIRS[4]])
@torch.no_grad()
def test_in_softmax_mode_and_in_softmax_layers_the_mask_acts_as_in_the_stock_model(stock_class, student_class):
    teacher = make(stock_class)
    inputs = pixels(teacher)
    mask, _ = half_masked(teacher, inputs)
    expected = teacher(inputs, attention_mask=mask)[0]
    assert (expected - teacher(inputs)[0]).abs().max() > 1e-2
    student = with_weights_of(teacher, student_class)
    student.set_attn_implementation("sdpa")
    hybrid = with_weights_of(teacher, student_class, softmax_layers=[0, 1, 2])
    for model in (student, hybrid):
        assert (model(inputs, attention_mask=mask)[0] - expected).abs().max() < 1e-5


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("feature_map", ["elu", "hedgehog"])
@pytest.mark.parametrize("model_class", [AdaLAViTForImageClassification, AdaLADinov2ForImageClassification])
def test_activation_checkpointing_runs_layers_again_and_gives_identical_gradients(model_class, feature_map):
    model = make(model_class, feature_map=feature_map, softmax_layers=[1]).train()
    inputs, labels, calls = pixels(model), torch.tensor([1, 3]), []
    attention_modules(model)[0].q_proj.register_forward_hook(lambda *args: calls.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        calls.clear()
        model(inputs, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert len(calls) == 2
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name
    trained = [name for name in plain if "q_proj" in name or "feature_map" in name]
    assert len(trained) == 6 + (4 if feature_map == "hedgehog" else 0)
    assert all(plain[name].abs().max() > 0 for name in trained)


# --- backbone --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_backbone_gives_a_map_per_stage_of_any_size():
    config = AdaLADinov2Config(**DINOV2, out_features=["stem", "stage2", "stage3"])
    model = AdaLADinov2Backbone(config).eval()
    maps = model(torch.randn(2, 3, 28, 42)).feature_maps
    assert [tuple(x.shape) for x in maps] == [(2, 64, 4, 6)] * 3
    assert model.channels == [64, 64, 64]
    with_states = model(torch.randn(1, 3, 28, 28), output_hidden_states=True)
    assert len(with_states.hidden_states) == 4
    indices = AdaLADinov2Backbone(AdaLADinov2Config(**DINOV2, out_indices=[1, 3]))
    assert indices.out_features == ["stage1", "stage3"]


# --- compiling and exporting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [AdaLAViTModel, AdaLADinov2Model])
@torch.no_grad()
def test_compiles_whole_with_a_mask(model_class):
    torch._dynamo.reset()
    model = make(model_class, softmax_layers=[1])
    inputs = pixels(model)
    mask, _ = half_masked(model, inputs)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(
        compiled(inputs, attention_mask=mask)[0], model(inputs, attention_mask=mask)[0], rtol=0, atol=1e-5
    )
    assert counter.frame_count == 1


@pytest.mark.parametrize("model_class", [AdaLAViTForImageClassification, AdaLADinov2ForImageClassification])
@torch.no_grad()
def test_exports_with_dynamic_batch(model_class):
    model = make(model_class, feature_map="t2r")
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        model, (), kwargs={"pixel_values": pixels(model)}, dynamic_shapes={"pixel_values": {0: batch}}, strict=False
    ).module()
    inputs = pixels(model, batch=5)
    expected = model(pixel_values=inputs).logits
    torch.testing.assert_close(exported(pixel_values=inputs).logits, expected, rtol=0, atol=1e-5)


def test_nothing_is_left_on_disk_but_the_model(tmp_path: Path):
    make(AdaLAViTModel).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".py"}  # the code: test_hub_code.py
    assert names == {"config.json", "model.safetensors"}


def test_the_options_of_each_feature_map_are_those_of_its_class():
    shape, options = {"self", "num_heads", "head_dim", "kwargs"}, {}
    for name, feature_map in FEATURE_MAPS.items():
        constructors = [
            vars(cls)["__init__"]
            for cls in feature_map.__mro__
            if issubclass(cls, FeatureMap) and "__init__" in vars(cls)
        ]
        options[name] = {key for constructor in constructors for key in signature(constructor).parameters} - shape
    assert options == {name: set(names) for name, names in FEATURE_MAP_OPTIONS.items()}
