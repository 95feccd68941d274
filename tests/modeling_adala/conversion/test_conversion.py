"""Teacher to student: every weight carried over, the proof of it, and errors that say what to do."""

import copy
import json
import logging

import pytest
import torch
from family_helpers import stock_model, tiny_config
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

import modeling_adala
from modeling_adala import (
    AdaLADinov2Backbone,
    AdaLADinov2ForImageClassification,
    AdaLADinov2Model,
    AdaLAError,
    AdaLAViTConfig,
    AdaLAViTForImageClassification,
    AdaLAViTForMaskedImageModeling,
    AdaLAViTModel,
    DataError,
    ParityReport,
    UsageError,
    convert,
)
from modeling_adala.attention_interface import is_new_parameter
from modeling_adala.conversion.convert import parity_report, student_config
from modeling_adala.conversion.loading import load_teacher
from modeling_adala.families import get_family
from modeling_adala.inspection.towers import attention_modules, forward_features, token_groups, vision_tower
from modeling_adala.mixins import image_inputs
from modeling_adala.modeling_adala import MODELS
from modeling_adala.modeling_adala import stock_class as stock_of

SHARED = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
VIT = SHARED | {"intermediate_size": 96, "image_size": 32, "patch_size": 4, "encoder_stride": 4, "num_labels": 5}
DINOV2 = SHARED | {"mlp_ratio": 2, "image_size": 28, "patch_size": 7, "num_labels": 5}
HEADS = {
    ViTModel: AdaLAViTModel,
    ViTForImageClassification: AdaLAViTForImageClassification,
    ViTForMaskedImageModeling: AdaLAViTForMaskedImageModeling,
    Dinov2Model: AdaLADinov2Model,
    Dinov2ForImageClassification: AdaLADinov2ForImageClassification,
    Dinov2Backbone: AdaLADinov2Backbone,
}


def make_teacher(stock_class, **options):
    """A small model in which no parameter, biases included, has a special value."""
    values = (VIT if "ViT" in stock_class.__name__ else DINOV2) | options
    if stock_class is Dinov2Backbone:
        values |= {"out_features": ["stage1", "stage3"]}
    teacher = stock_class(stock_class.config_class(**values))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return teacher


def assert_carries_the_weights(student, teacher) -> None:
    weights = student.state_dict()
    assert {name for name in weights if not is_new_parameter(name)} == teacher.state_dict().keys()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(weights[name], tensor), name
        assert weights[name].data_ptr() != tensor.data_ptr(), f"{name} is shared with the teacher"


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stock_class", "student_class"), HEADS.items())
def test_converts_a_model_object_and_leaves_the_teacher_as_it_was(stock_class, student_class):
    teacher = make_teacher(stock_class)
    before, config_before = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    student = convert(teacher)
    assert type(student) is student_class
    assert_carries_the_weights(student, teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert teacher.config.to_dict() == config_before
    assert teacher.config._attn_implementation == "sdpa"
    assert student.config._attn_implementation == "adala"
    assert not student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.config.adala_stage == "converted"
    assert student.config.teacher_name_or_path is None  # a model that was never saved has no name


@pytest.mark.parametrize(("revision", "commit"), [(None, "a" * 40), ("v1", "b" * 40), ("b" * 40, "b" * 40)])
def test_a_teacher_of_the_hub_is_recorded_with_its_commit(revision, commit, tmp_path, monkeypatch):
    repository = tmp_path / "models--org--vit"
    for name, target in {"main": "a" * 40, "v1": "b" * 40}.items():
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(target)
        make_teacher(ViTModel).save_pretrained(repository / "snapshots" / target)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    teacher = load_teacher("org/vit", **({} if revision is None else {"revision": revision}))
    students = [convert(copy.deepcopy(teacher)), *([convert("org/vit")] if revision is None else [])]
    for student in students:
        assert (student.config.teacher_name_or_path, student.config.teacher_revision) == ("org/vit", commit)


@pytest.mark.parametrize(("stock_class", "student_class"), HEADS.items())
def test_converts_a_saved_folder_with_its_own_head(stock_class, student_class, tmp_path):
    teacher = make_teacher(stock_class, hidden_dropout_prob=0.1)
    teacher.save_pretrained(tmp_path)
    student = convert(str(tmp_path), feature_map="hedgehog", softmax_layers=[-1])
    assert type(student) is student_class
    assert_carries_the_weights(student, teacher)
    config = student.config
    assert config.teacher_name_or_path == str(tmp_path)
    assert config.teacher_revision is None
    assert config.adala_stage == "converted"
    assert (config.feature_map, config.softmax_layers) == ("hedgehog", [2])
    assert config.model_type == f"adala_{teacher.config.model_type}"
    for name in ("hidden_size", "image_size", "patch_size", "num_labels", "hidden_dropout_prob", "layer_norm_eps"):
        assert getattr(config, name) == getattr(teacher.config, name)
    if stock_class is Dinov2Backbone:
        assert student.out_features == ["stage1", "stage3"]


def test_a_folder_may_be_a_path_object(tmp_path):
    teacher = make_teacher(ViTModel)
    teacher.save_pretrained(tmp_path)
    student = convert(tmp_path)
    assert student.config.teacher_name_or_path == str(tmp_path)
    assert_carries_the_weights(student, teacher)


def test_provenance_is_written_to_disk(tmp_path):
    make_teacher(Dinov2Model).save_pretrained(tmp_path / "teacher")
    student = convert(str(tmp_path / "teacher"))
    student.save_pretrained(tmp_path / "student")
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert written["teacher_name_or_path"] == "teacher"  # the folders above it are of this machine
    assert written["adala_stage"] == "converted"
    assert written["architectures"] == ["AdaLADinov2Model"]


def test_head_chooses_another_class_than_the_checkpoint_was_saved_as(tmp_path):
    teacher = make_teacher(Dinov2ForImageClassification)
    teacher.save_pretrained(tmp_path)
    student = convert(str(tmp_path), head="Model")
    assert type(student) is AdaLADinov2Model
    assert_carries_the_weights(student, teacher.dinov2)


def test_learned_feature_maps_start_neutral():
    student = convert(make_teacher(ViTModel), feature_map="t2r", feature_map_kwargs={"feature_dim": 24})
    for module in attention_modules(student):
        assert torch.equal(module.feature_map.weight_q, torch.eye(16, 24).expand(4, 16, 24))
        assert torch.equal(module.feature_map.bias_k, torch.zeros(4, 1, 24))


def test_labels_are_carried_over():
    names = {0: "cat", 1: "dog", 2: "cow"}
    student = convert(make_teacher(ViTForImageClassification, num_labels=3, id2label=names))
    assert student.config.id2label == names
    assert student.classifier.out_features == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_gives_a_student_in_float32(dtype):
    teacher = make_teacher(ViTModel).to(dtype)
    before = copy.deepcopy(teacher.state_dict())
    student = convert(teacher)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert torch.equal(student.layers[0].attention.q_proj.weight, before["layers.0.attention.q_proj.weight"].float())
    for name, tensor in teacher.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, before[name]), name


def test_a_teacher_in_eager_mode_converts_too():
    teacher = make_teacher(ViTModel)
    teacher.set_attn_implementation("eager")
    student = convert(teacher)
    assert student.config._attn_implementation == "adala"
    assert teacher.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", MODELS)
def test_convert_and_parity_report_leave_a_model_as_it_was(name):
    """A model in the middle of its training, as a notebook has it: its mode, gradients, attention, dtype, weights."""
    teacher = stock_model(name).train()
    teacher.set_attn_implementation("eager")
    module = attention_modules(teacher)[0].eval()  # one that was frozen on purpose
    attention_modules(teacher)[1].requires_grad_(False)
    parameters = {key: (p, p._version, p.requires_grad, p.dtype, p.device) for key, p in teacher.named_parameters()}
    modes = {key: module.training for key, module in teacher.named_modules()}
    config = teacher.config.to_dict()
    student = convert(teacher)
    student.train()
    assert parity_report(teacher, student).passed
    assert student.training and vision_tower(student).config._attn_implementation == "adala"
    assert {key: module.training for key, module in teacher.named_modules()} == modes
    assert not module.training and teacher.training
    for key, parameter in teacher.named_parameters():
        before = parameters[key]
        assert parameter is before[0], key
        assert (parameter._version, parameter.requires_grad, parameter.dtype, parameter.device) == before[1:], key
    assert vision_tower(teacher).config._attn_implementation == "eager"
    assert teacher.config.to_dict() == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules() if m is not teacher)


def test_dropout_does_not_disturb_the_comparison():
    teacher = make_teacher(ViTModel, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    assert parity_report(teacher, convert(teacher)).passed
    assert teacher.training


# --- parity ----------------------------------------------------------------------------------------------------------


def test_parity_report_measures_a_native_and_a_rectangular_size(caplog):
    with caplog.at_level(logging.INFO, logger="modeling_adala"):
        vit = parity_report(teacher := make_teacher(ViTModel), convert(teacher))
        dinov2 = parity_report(teacher := make_teacher(Dinov2Model), convert(teacher))
    assert list(vit.differences) == ["32x32", "16x24"]
    assert list(dinov2.differences) == ["28x28", "28x42"]
    assert vit.max_difference == max(vit.differences.values()) < 1e-5
    assert "parity passed" in caplog.text and "32x32" in caplog.text


def test_parity_report_reads_as_one_line():
    report = ParityReport({"32x32": 2e-7, "16x24": 3e-7})
    assert report.passed
    assert report.max_difference == 3e-7
    assert str(report) == ("parity passed (softmax mode against teacher, max abs diff 32x32: 2.0e-07, 16x24: 3.0e-07)")
    failed = ParityReport({"32x32": 2e-7, "16x24": 3e-3})
    assert not failed.passed
    assert str(failed).startswith("parity FAILED")
    assert ParityReport({"32x32": 3e-3}, tolerance=1e-2).passed


def test_parity_counts_not_a_number_as_a_failure():
    """Neither at the first size nor at the second."""
    nan = float("nan")
    assert not ParityReport({"32x32": nan, "16x24": 1e-7}).passed
    assert not ParityReport({"32x32": 1e-7, "16x24": nan}).passed


@pytest.mark.parametrize("stock_class", HEADS)
@torch.no_grad()
def test_parity_fails_for_a_student_with_one_wrong_weight(stock_class):
    teacher = make_teacher(stock_class)
    student = convert(teacher)
    assert parity_report(teacher, student).passed
    attention_modules(student)[1].v_proj.weight[3, 5] += 0.1
    report = parity_report(teacher, student)
    assert not report.passed
    assert report.max_difference > 1e-4
    assert student.config._attn_implementation == "adala"  # back in linear mode


def test_convert_refuses_to_hand_over_a_student_that_fails_parity(monkeypatch):
    monkeypatch.setattr("modeling_adala.conversion.convert.parity_report", lambda *args: ParityReport({"32x32": 0.5}))
    with pytest.raises(AdaLAError, match=r"parity FAILED .*32x32: 5\.0e-01.*does not carry the teacher's weights"):
        convert(make_teacher(ViTModel))
    student = convert(make_teacher(ViTModel), check_parity=False)
    assert type(student) is AdaLAViTModel


@torch.no_grad()
def test_the_student_is_linear_and_not_softmax():
    for stock_class in (ViTModel, Dinov2Model):
        teacher = make_teacher(stock_class)
        student = convert(teacher)
        pixels = torch.randn(1, 3, student.config.image_size, student.config.image_size)
        assert (student(pixels)[0] - teacher(pixels)[0]).abs().max() > 1e-2


# --- errors ----------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("config", [BertConfig(num_hidden_layers=1), SwinConfig(depths=[1])])
def test_an_unsupported_family_is_refused_with_the_supported_ones_named(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError) as error:
        convert(str(tmp_path))
    message = one_line(error)
    assert repr(config.model_type) in message
    assert "vit" in message and "dinov2" in message


def test_an_unsupported_model_object_is_refused():
    bert = BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=9))
    with pytest.raises(UsageError, match="'bert' is not supported; choose a teacher of vit, "):
        convert(bert)


def test_a_student_is_no_teacher(tmp_path):
    student = convert(make_teacher(ViTModel))
    with pytest.raises(UsageError, match="AdaLAViTModel' is a linear-attention student; pass the softmax model"):
        convert(student)
    student.save_pretrained(tmp_path)
    with pytest.raises(UsageError) as error:
        convert(str(tmp_path))
    assert str(tmp_path) in one_line(error)
    assert "linear-attention student" in str(error.value)


def test_a_folder_that_does_not_exist_is_one_clear_line(tmp_path):
    for missing in (str(tmp_path / "nothing"), "no-such-org/no-such-model"):
        with pytest.raises(DataError) as error:
            convert(missing)
        message = one_line(error)
        assert repr(missing) in message
        assert "Pass a folder with a config.json or a reachable Hub id" in message


def test_a_folder_without_a_config_is_one_clear_line(tmp_path):
    with pytest.raises(DataError) as error:
        convert(str(tmp_path))
    assert repr(str(tmp_path)) in one_line(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "gelu"}, "feature_map='gelu' is unknown"),
        ({"softmax_layers": [7]}, "layer 7 does not exist"),
        ({"feature_map_kwargs": {"width": 3}}, "width"),
        ({"head": "ForObjectDetection"}, "head='ForObjectDetection' does not exist.*Model, ForImageClassification"),
    ],
)
def test_wrong_options_are_usage_errors_before_the_weights_are_read(options, message, tmp_path):
    make_teacher(ViTModel).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=message):
        convert(str(tmp_path), **options)


def test_load_teacher_is_frozen_float32_and_in_eval_mode(tmp_path):
    make_teacher(ViTForImageClassification).half().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert type(teacher) is ViTForImageClassification
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.dtype == torch.float32
    assert type(load_teacher(str(tmp_path), "Model")) is ViTModel


# --- the family table ------------------------------------------------------------------------------------------------


def test_family_table_lists_every_exported_model():
    listed = {cls.__name__ for family in MODELS.values() for cls in family.values()}
    exported = {
        name
        for name in modeling_adala.__all__
        if name.startswith("AdaLA")
        and hasattr(getattr(modeling_adala, name), "from_pretrained")
        and not name.endswith("Config")
    }
    assert listed == exported >= {cls.__name__ for cls in HEADS.values()}
    assert get_family("adala_vit") is get_family("vit")
    with pytest.raises(UsageError, match="'swin' is not supported; choose a teacher of vit, "):
        get_family("swin")


def test_student_config_keeps_stock_fields_and_adds_options():
    teacher = ViTConfig(**VIT, hidden_act="relu")
    config = student_config(teacher, feature_map="relu", softmax_layers=[-1])
    assert type(config) is AdaLAViTConfig
    stock, adala = teacher.to_dict(), config.to_dict()
    changed = {name for name in stock if stock[name] != adala[name]}
    assert changed <= {"model_type", "architectures", "transformers_version"}
    assert (config.feature_map, config.softmax_layers, config.hidden_act) == ("relu", [2], "relu")


def test_token_groups_cover_all_tokens_once():
    assert token_groups(ViTConfig()) == {"cls": slice(0, 1), "patches": slice(1, None)}
    assert token_groups(Dinov2Config()).keys() == {"cls", "patches"}
    with_registers = ViTConfig()
    with_registers.num_register_tokens = 4
    groups = token_groups(with_registers)
    tokens = list(range(1 + 4 + 9))
    assert tokens[groups["cls"]] == [0]
    assert tokens[groups["registers"]] == [1, 2, 3, 4]
    assert tokens[groups["patches"]] == list(range(5, 14))


@pytest.mark.parametrize("stock_class", HEADS)
def test_attention_modules_come_in_layer_order_for_stock_and_adala_models(stock_class):
    teacher = make_teacher(stock_class)
    student = convert(teacher, check_parity=False)
    ours, theirs = attention_modules(student), attention_modules(teacher)
    assert len(ours) == len(theirs) == 3
    for mine, stock in zip(ours, theirs):
        assert torch.equal(mine.o_proj.weight, stock.o_proj.weight)


@pytest.mark.parametrize("stock_class", HEADS)
@torch.no_grad()
def test_forward_features_are_those_after_the_last_layer_norm_at_any_size(stock_class):
    model = make_teacher(stock_class).eval()
    patch = model.config.patch_size
    pixels = torch.randn(1, 3, 3 * patch, 5 * patch)
    features = forward_features(model, pixels)
    assert features.shape == (1, 1 + 15, 64)
    inputs = image_inputs(model.config, pixels)
    assert inputs.get("interpolate_pos_encoding", False) == (model.config.model_type == "vit")
    base = model.base_model
    hidden = base(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(features, base.layernorm(hidden), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "deit", "ijepa"])
def test_a_teacher_without_a_pooler_gives_a_student_without_one(name):
    student_class = MODELS[name]["Model"]
    teacher_class = stock_of(student_class)
    teacher = teacher_class(tiny_config(teacher_class.config_class), add_pooling_layer=False)
    student = convert(teacher)
    assert type(student) is student_class and student.pooler is None
