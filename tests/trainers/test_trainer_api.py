"""What a user of Transformers and TRL tries first: no `args`, a model's name, adapters, an evaluator."""

from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig, PromptLearningConfig
from training_helpers import (
    LABELS,
    QUIET,
    NoiseImages,
    copy_state,
    moved,
    names_with,
    tiny_dinov2,
    tiny_vit,
    unfolded,
)
from transformers import AutoModelForImageClassification, HfArgumentParser

from modeling_adala import UsageError, convert, load_student
from trainers import (
    DataConfig,
    FeatureAlignmentTrainer,
    FeatureEvaluator,
    ImageDataset,
    ImageTransform,
    SupervisedConfig,
    SupervisedTrainer,
    compare_features,
    load_digits,
)
from trainers.data.labels import class_names
from trainers.runs.stages import STAGES, run_stage

ATTENTION, FEATURES, SUPERVISED = STAGES
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
SETTINGS = {**QUIET, "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}


@pytest.fixture(scope="module")
def teacher():
    return tiny_vit()


@pytest.fixture(scope="module")
def saved(teacher, tmp_path_factory) -> str:
    """The folder of a student."""
    folder = tmp_path_factory.mktemp("student")
    convert(teacher, check_parity=False).save_pretrained(folder)
    return str(folder)


def trainer_of(stage: str, model, teacher, folder: Path, *, args=None, **kwargs):
    args = args or STAGES[stage].config_class(output_dir=str(folder), **SETTINGS)
    others = {} if stage == SUPERVISED else {"teacher_model": teacher}
    return STAGES[stage].trainer_class(model=model, args=args, train_dataset=NoiseImages(8), **others, **kwargs)


# --- args and model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_without_args_a_stage_has_its_own_defaults(stage, saved, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = {} if stage == SUPERVISED else {"teacher_model": teacher}
    trainer = STAGES[stage].trainer_class(model=load_student(saved), train_dataset=NoiseImages(8), **others)
    default = STAGES[stage].config_class()
    assert type(trainer.args) is type(default)
    assert trainer.args.output_dir == default.output_dir
    assert trainer.args.learning_rate == default.learning_rate


@pytest.mark.parametrize("stage", STAGES)
def test_name_of_a_model_is_opened(stage, saved, teacher, tmp_path):
    trainer = trainer_of(stage, Path(saved) if stage == FEATURES else saved, teacher, tmp_path)
    assert type(trainer.model).__name__ == "AdaLAViTForImageClassification"
    before = copy_state(load_student(saved))
    assert not moved(before, copy_state(trainer.model))
    trainer.train()
    assert moved(before, copy_state(trainer.model))


@pytest.mark.parametrize("stage", [FEATURES, SUPERVISED])
def test_settings_of_the_caller_stay_as_they_are(stage, saved, teacher, tmp_path):
    args = STAGES[stage].config_class(output_dir=str(tmp_path), **SETTINGS)
    before = args.to_dict()
    trainer_of(stage, saved, teacher, tmp_path, args=args)
    assert args.to_dict() == before


def test_classifier_opened_by_name_has_the_classes_of_the_data(saved, tmp_path):
    names = ["even", "odd"]
    features = Features(load_digits("test").features | {"label": ClassLabel(names=names)})
    rows = load_digits("test").select(range(8)).map(lambda row: {"label": row["label"] % 2}, features=features)
    data = ImageDataset(rows, ImageTransform(28, 0.0, 1.0, num_channels=1), label_column="label")
    args = SupervisedConfig(output_dir=str(tmp_path), **SETTINGS)
    trainer = SupervisedTrainer(saved, args, train_dataset=data)
    assert trainer.model.config.id2label == dict(enumerate(names))
    trainer.train()


def test_class_names_are_those_of_the_label_column():
    rows = load_digits("test").select(range(2))
    assert class_names(rows) == LABELS
    assert class_names(rows.rename_column("label", "digit")) is None
    assert class_names(Dataset.from_dict({"label": [0]}, features=Features(label=Value("int64")))) is None
    assert class_names(NoiseImages(2)) is class_names(None) is None


@pytest.mark.parametrize("config_class", [DataConfig, *(stage.config_class for stage in STAGES.values())])
def test_settings_are_arguments_of_a_script_of_transformers(config_class):
    number = {"crop_scale": 0.25} if config_class is DataConfig else {"learning_rate": 0.25}
    arguments = {"dataset": "mnist-digits"} if config_class is DataConfig else {"output_dir": "out"}
    line = [part for name, value in (arguments | number).items() for part in (f"--{name}", str(value))]
    (config,) = HfArgumentParser(config_class).parse_args_into_dataclasses(line)
    assert all(getattr(config, name) == value for name, value in (arguments | number).items())
    with pytest.raises(UsageError, match="must be"):
        HfArgumentParser(config_class).parse_args_into_dataclasses([*line[:-1], "-1"])


# --- adapters --------------------------------------------------------------------------------------------------------


def test_stage_1_with_lora_moves_the_adapters_of_linear_layers_alone(tmp_path):
    teacher = tiny_vit(layers=3)
    student = convert(teacher, check_parity=False, softmax_layers=[1])
    settings = SETTINGS | {"learning_rate": 1e-2, "max_steps": 8, "per_device_train_batch_size": 8}
    args = STAGES[ATTENTION].config_class(output_dir=str(tmp_path), **settings)
    trainer = trainer_of(ATTENTION, student, teacher, tmp_path, args=args, peft_config=LoraConfig(**LORA))
    before = copy_state(trainer.model)
    trainer.train()
    adapters = names_with(("lora_",), before)
    assert moved(before, copy_state(trainer.model)) == {name for name in adapters if ".layers.1." not in name}
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


def test_stage_1_adapters_start_from_the_loss_of_the_bare_student(tmp_path, teacher):
    losses = []
    for options in ({}, {"peft_config": LoraConfig(**LORA)}):
        student = convert(teacher, check_parity=False)
        trainer = trainer_of(ATTENTION, student, teacher, tmp_path, eval_dataset=NoiseImages(4), **options)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("modules", ["all-linear", ["fc1"], ["o_proj"]])
def test_stage_1_refuses_adapters_that_it_would_not_train(tmp_path, teacher, modules):
    student = convert(teacher, check_parity=False)
    with pytest.raises(UsageError, match=r"peft_config: stage 1 .* target_modules"):
        trainer_of(ATTENTION, student, teacher, tmp_path, peft_config=LoraConfig(target_modules=modules))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear"])
def test_stage_3_with_lora_trains_the_adapters_and_the_head_each_at_its_rate(tmp_path, teacher, linear, modules):
    model = convert(teacher, check_parity=False) if linear else tiny_vit()
    config = LoraConfig(r=2, target_modules=modules)
    trainer = trainer_of(SUPERVISED, model, None, tmp_path, peft_config=config, eval_dataset=NoiseImages(8))
    assert not config.modules_to_save, "the caller's object was changed"
    before = copy_state(trainer.model)
    trainer.train()
    head = names_with(("classifier.modules_to_save",), before)
    changed = moved(before, copy_state(trainer.model))
    assert len(head) == 2 and head < changed and changed <= head | names_with(("lora_",), before)
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        rates |= dict.fromkeys(map(id, group["params"]), group["initial_lr"])
    names = {name: rates[id(p)] for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, rate in names.items():
        expected = trainer.args.head_learning_rate if "classifier" in name else trainer.args.learning_rate
        assert rate == expected, name
    assert "eval_accuracy" in trainer.evaluate()


def test_stage_3_has_rates_for_the_head_and_for_what_the_teacher_lacks(tmp_path, teacher):
    model = convert(teacher, check_parity=False)
    args = SupervisedConfig(output_dir=str(tmp_path), new_learning_rate=5e-4, **SETTINGS)
    trainer = SupervisedTrainer(model, args, train_dataset=NoiseImages(8))
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        rates |= dict.fromkeys(map(id, group["params"]), group["lr"])
    expected = {"classifier.": args.head_learning_rate, "local_mixing.": 5e-4, "feature_map.": 5e-4}
    found = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in found.items():
        assert rate == next((r for part, r in expected.items() if part in name), args.learning_rate), name
    assert len(set(found.values())) == 3


def test_stage_3_with_lora_leaves_a_plain_checkpoint(tmp_path, teacher):
    model = convert(teacher, check_parity=False)
    names, args = model.state_dict().keys(), SupervisedConfig(output_dir=str(tmp_path / "3"), **SETTINGS)
    run_stage(STAGES[SUPERVISED], model, args, train_dataset=NoiseImages(8), peft_config=LoraConfig(**LORA))
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "3")
    assert reloaded.state_dict().keys() == unfolded(names)
    assert not torch.equal(reloaded.classifier.weight, teacher.classifier.weight)


def test_adapters_that_cannot_do_what_is_asked_are_refused(tmp_path, saved):
    with pytest.raises(UsageError, match="freeze_backbone=True with peft_config"):
        args = SupervisedConfig(output_dir=str(tmp_path), freeze_backbone=True, **SETTINGS)
        trainer_of(SUPERVISED, saved, None, tmp_path, args=args, peft_config=LoraConfig(**LORA))
    with pytest.raises(UsageError, match="PromptLearningConfig learns prompts"):
        trainer_of(SUPERVISED, saved, None, tmp_path, peft_config=PromptLearningConfig())
    adapted = trainer_of(SUPERVISED, saved, None, tmp_path, peft_config=LoraConfig(**LORA)).model
    with pytest.raises(UsageError, match="has adapters already"):
        trainer_of(SUPERVISED, adapted, None, tmp_path, peft_config=LoraConfig(**LORA))


# --- evaluator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_evaluator_runs_at_each_evaluation_and_its_figures_are_logged(tmp_path, stage):
    teacher, data = tiny_dinov2(), NoiseImages(12)
    student = convert(teacher, check_parity=False)
    args = STAGES[stage].config_class(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=1, **SETTINGS)
    evaluator = FeatureEvaluator(teacher, data, num_images=5, batch_size=2)
    trainer = trainer_of(stage, student, teacher, tmp_path, args=args, eval_dataset=data, evaluator=evaluator)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["eval_relative_error"] != lines[1]["eval_relative_error"]
    expected, *_ = compare_features(teacher, student, evaluator.loader)
    assert {f"eval_{name}": value for name, value in expected.items()}.items() <= lines[1].items()
    assert len(evaluator.loader.dataset) == 5


def test_evaluator_sees_the_student_in_eval_mode_and_without_gradients(tmp_path, teacher):
    seen = []

    def evaluator(model):
        seen.append((model.training, torch.is_grad_enabled(), model is trainer.model))
        return {"figure": 0.5}

    student = convert(teacher, check_parity=False)
    trainer = trainer_of(FEATURES, student, teacher, tmp_path, eval_dataset=NoiseImages(4), evaluator=evaluator)
    assert isinstance(trainer, FeatureAlignmentTrainer)
    assert trainer.evaluate(metric_key_prefix="test")["test_figure"] == 0.5
    assert seen == [(False, False, True)]


def test_best_model_is_that_of_the_highest_cosine_and_of_the_lowest_error():
    for metric, greater in (("eval_patches_cosine", True), ("eval_relative_error", False), ("loss", False)):
        assert STAGES[FEATURES].config_class(metric_for_best_model=metric).greater_is_better is greater
