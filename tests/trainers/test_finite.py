"""A loss, gradient or weight that is not a finite number ends the run there, and is never saved."""

import math

import pytest
import torch
from test_trainers import ATTENTION, FEATURES, STAGES, SUPERVISED, setting_of, student_of, trainer_of
from training_helpers import QUIET, NoiseImages, tiny_vit

from modeling_adala import AdaLAError
from trainers import AttentionAlignmentConfig, SupervisedConfig
from trainers.base_trainer import AdaLATrainer, check_finite
from trainers.runs.checkpoints import list_checkpoints
from trainers.runs.stages import STAGES as STAGE_TABLE
from trainers.runs.stages import run_stage


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


class Poisoned(NoiseImages):
    """Images that are NaN from the sixth on."""

    def __getitem__(self, index: int) -> dict:
        example = super().__getitem__(index)
        return example | {"pixel_values": example["pixel_values"] + (math.nan if index >= 6 else 0.0)}


@pytest.mark.parametrize("stage", STAGES)
def test_loss_that_is_not_finite_ends_the_run_at_its_step(tmp_path, stage):
    model, teacher = setting_of(stage)
    settings = {"train_dataset": Poisoned(8), "per_device_train_batch_size": 2, "max_steps": 8, "save_steps": 1}
    if stage != SUPERVISED:
        settings["calibration_images"] = 1
    trainer = trainer_of(stage, tmp_path, model, teacher, save_strategy="steps", **settings)
    if stage != SUPERVISED:
        trainer.calibration_batches = lambda: [torch.randn(4, 1, 28, 28)]
    with pytest.raises(AdaLAError) as error:
        trainer.train()
    step = trainer.state.global_step
    assert f"stage {stage}, step {step + 1}: the loss is nan" in one_line(error)
    parts = {ATTENTION: "block_0", FEATURES: "cls", SUPERVISED: "learning_rate="}
    assert parts[stage] in str(error.value)
    assert all(path.name != f"checkpoint-{step + 1}" for path in list_checkpoints(tmp_path))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_block_that_diverges_is_named(tmp_path):
    teacher = tiny_vit()
    student = student_of(teacher)
    with torch.no_grad():
        student.vit.layers[1].attention.q_proj.weight[0, 0] = math.inf
    with pytest.raises(AdaLAError) as error:
        trainer_of(ATTENTION, tmp_path, student, teacher, max_steps=2).train()
    assert "in block_1." in one_line(error) and "block_0" not in str(error.value)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_gradient_that_is_not_finite_ends_the_run_before_the_weights_move(tmp_path, max_grad_norm, bad):
    model, _ = setting_of(SUPERVISED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.classifier.weight.register_hook(lambda gradient: gradient * bad)
    trainer = trainer_of(SUPERVISED, tmp_path, model, max_steps=2, max_grad_norm=max_grad_norm)
    with pytest.raises(AdaLAError) as error:
        trainer.train()
    assert "stage supervised, step 1: the gradient norm is" in one_line(error)
    assert "classifier.weight" in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("where", ["checkpoint", "end"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, where):
    """Here, they become so between the check of the gradients and the save."""
    model, _ = setting_of(SUPERVISED)

    class Breaking(AdaLATrainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            with torch.no_grad():
                self.model.classifier.bias[0] = math.nan
            super()._maybe_log_save_evaluate(*args, **kwargs)

    stage = STAGE_TABLE[SUPERVISED]
    args = SupervisedConfig(
        output_dir=str(tmp_path / "3"),
        max_steps=1,
        save_strategy="steps" if where == "checkpoint" else "no",
        save_steps=1,
        **QUIET,
    )
    row = type(stage)(stage.number, stage.name, stage.config_class, type("Both", (Breaking, stage.trainer_class), {}))
    with pytest.raises(AdaLAError, match="not finite in 1 of") as error:
        run_stage(row, model, args, train_dataset=NoiseImages(8))
    assert "'classifier.bias'" in one_line(error)
    assert not (tmp_path / "3").exists()


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_teacher_with_nan_is_the_culprit(tmp_path, stage):
    teacher = tiny_vit()
    student = student_of(teacher)
    with torch.no_grad():
        teacher.vit.layers[0].attention.v_proj.weight[0, 0] = math.nan
    with pytest.raises(AdaLAError, match=r"teacher .* holds non-finite weights in 1 of"):
        trainer_of(stage, tmp_path, student, teacher, max_steps=1).train()


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_images_that_the_teacher_cannot_take_end_the_run_before_its_first_step(tmp_path, stage):
    model, teacher = setting_of(stage)
    trainer = trainer_of(stage, tmp_path, model, teacher, train_dataset=Poisoned(8), max_steps=1)
    with pytest.raises(AdaLAError, match="teacher_model gives features that are not finite") as error:
        trainer.train()
    assert "image_std" in one_line(error)
    assert trainer.state.global_step == 0


def test_loss_of_nan_is_logged_as_what_it_is():
    assert AttentionAlignmentConfig(output_dir="x", **QUIET).logging_nan_inf_filter is False


def test_integers_have_no_nan():
    check_finite({"mask": torch.ones(2, dtype=torch.long)}, "the weights")
    with pytest.raises(AdaLAError, match="'b'"):
        check_finite({"a": torch.zeros(1), "b": torch.tensor([math.inf])}, "the weights")
