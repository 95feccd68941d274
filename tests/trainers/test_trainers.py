"""The three trainers: what moves and what does not, losses computed by hand, and what survives an interruption."""

import errno
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from training_helpers import (
    QUIET,
    InterruptAt,
    Interrupted,
    KeepGradients,
    NoiseImages,
    assert_same_tensors,
    copy_state,
    moved,
    names_with,
    tiny_dinov2,
    tiny_vit,
)
from transformers import PreTrainedModel, TrainerCallback

from hub_cards.records import append_metrics
from modeling_adala import CheckpointError, DataError, UsageError, convert
from modeling_adala.conversion.loading import load_student
from trainers.attention_alignment_config import AttentionAlignmentConfig
from trainers.feature_alignment_config import FeatureAlignmentConfig
from trainers.runs.callbacks import MetricsFileCallback, read_metrics
from trainers.runs.checkpoints import list_checkpoints
from trainers.runs.stages import STAGES, run_stage
from trainers.supervised_config import SupervisedConfig
from trainers.teacher import visit_attention

ATTENTION, FEATURES, SUPERVISED = STAGES
TRAINED_IN_STAGE_1 = (".q_proj.", ".k_proj.", ".v_proj.", ".feature_map.")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def student_of(teacher: PreTrainedModel, **options) -> PreTrainedModel:
    return convert(teacher, check_parity=False, **{"feature_map": "elu", "local_mixing": 0, **options})


def trainer_of(stage: str, folder: Path, student: PreTrainedModel, teacher=None, *, callbacks=None, **settings):
    """The stage's trainer on 8 images in batches of 8, quiet and in float32 unless `settings` say otherwise."""
    names = ("train_dataset", "eval_dataset", "peft_config", "compute_metrics")
    kwargs = {"train_dataset": NoiseImages(8)} | {n: settings.pop(n) for n in names if n in settings}
    defaults = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 1}
    if stage == FEATURES:
        defaults["hidden_states"] = []
    args = STAGES[stage].config_class(output_dir=str(folder), **{**QUIET, **defaults, **settings})
    if teacher is not None:
        kwargs["teacher_model"] = teacher
    return STAGES[stage].trainer_class(model=student, args=args, callbacks=callbacks, **kwargs)


def batch_of(dataset: NoiseImages) -> torch.Tensor:
    return torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])


def block_losses_by_hand(teacher, student, pixels: torch.Tensor, layers: list[int]) -> list[float]:
    """Walks through the teacher; at each block, its input goes into both attentions."""
    losses = []
    with torch.no_grad():
        hidden = teacher.vit.embeddings(pixels)
        for index, layer in enumerate(teacher.vit.layers):
            normed = layer.layernorm_before(hidden)
            target = layer.attention(normed)[0]
            if index in layers:
                error = ((student.vit.layers[index].attention(normed)[0] - target) ** 2).mean()
                rows = target.reshape(-1, target.shape[-1]).double()
                losses.append((error / rows.var(dim=0, correction=0).mean()).item())
            hidden = layer(hidden)
    return losses


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def test_stage_1_moves_projections_and_feature_maps_of_linear_layers_and_nothing_else(tmp_path):
    teacher = tiny_vit(layers=3)
    student = student_of(teacher, feature_map="hedgehog", softmax_layers=[1])
    teacher_before, before = copy_state(teacher), copy_state(student)
    trainer_of(ATTENTION, tmp_path, student, teacher).train()
    trained = names_with(TRAINED_IN_STAGE_1, names_with((".layers.0.", ".layers.2."), before))
    assert moved(before, copy_state(student)) == trained
    assert len(trained) == 2 * (2 + 2 + 2 + 2)
    assert_same_tensors(copy_state(teacher), teacher_before)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_stage_1_loss_is_that_of_each_block_on_the_teachers_input_of_that_block(tmp_path):
    teacher, dataset = tiny_vit(layers=3), NoiseImages(8)
    student = student_of(teacher, softmax_layers=[1])
    pixels = batch_of(dataset)
    expected = block_losses_by_hand(teacher, student, pixels, layers=[0, 2])
    trainer = trainer_of(ATTENTION, tmp_path, student, teacher, train_dataset=dataset, max_steps=1)
    loss = trainer.compute_loss(student, {"pixel_values": pixels})
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-4)
    trainer.train()
    first = trainer.state.log_history[0]
    assert [first["block_0"], first["block_2"]] == pytest.approx(expected, rel=1e-4)
    assert "block_1" not in first
    assert first["loss"] == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert min(expected) > 0.05  # else the test would say nothing


def test_stage_1_variance_is_measured_on_the_calibration_images_alone(tmp_path):
    teacher, dataset = tiny_vit(), NoiseImages(8)
    student = student_of(teacher)
    trainer = trainer_of(
        ATTENTION,
        tmp_path,
        student,
        teacher,
        train_dataset=dataset,
        calibration_images=3,
        per_device_train_batch_size=2,
    )
    targets: list[torch.Tensor] = []
    images = torch.cat(list(trainer.calibration_batches()))
    assert len(images) == 3
    visit_attention(teacher, images, [0, 1], lambda layer, tap: targets.append(tap.output))
    expected = [target.flatten(0, 1).var(dim=0, correction=0).mean().item() for target in targets]
    assert [variance.item() for variance in trainer.variances()] == pytest.approx(expected, rel=1e-5)


def test_stage_1_runs_the_linear_attentions_of_the_student_and_none_of_its_mlps(tmp_path):
    teacher = tiny_vit(layers=3)
    student = student_of(teacher, softmax_layers=[1])
    calls: dict[str, int] = {}

    def count(name: str):
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    for index, layer in enumerate(student.vit.layers):
        layer.mlp.register_forward_hook(count("mlp"))
        layer.attention.register_forward_hook(count(f"attention {index}"))
    student.vit.embeddings.register_forward_hook(count("embeddings"))
    trainer_of(ATTENTION, tmp_path, student, teacher, max_steps=2).train()
    assert calls == {"attention 0": 2, "attention 2": 2}


def test_stage_1_trains_each_block_as_if_it_were_alone(tmp_path):
    """The gradient of block 0 does not depend on whether block 1 is trained beside it (but for the mean's 1/2)."""
    teacher = tiny_vit()
    gradients = []
    for softmax_layers in ([], [1]):
        keep = KeepGradients()
        student = student_of(teacher, softmax_layers=softmax_layers)
        settings = {"max_steps": 1, "max_grad_norm": 0.0, "callbacks": [keep]}
        trainer_of(ATTENTION, tmp_path, student, teacher, **settings).train()
        gradients.append(keep.gradients)
    assert len(gradients[1]) == 6
    for name, alone in gradients[1].items():
        torch.testing.assert_close(2 * gradients[0][name], alone, rtol=1e-5, atol=1e-8)


def test_logged_components_are_means_over_the_logging_window(tmp_path):
    teacher = tiny_vit()
    logs = []
    for settings in ({"logging_steps": 1}, {"logging_steps": 2, "logging_first_step": False}):
        trainer = trainer_of(ATTENTION, tmp_path, student_of(teacher), teacher, max_steps=4, **settings)
        trainer.train()
        logs.append([line for line in trainer.state.log_history if "loss" in line])
    each, pairs = logs
    assert [line["step"] for line in pairs] == [2, 4]
    for name in ("loss", "block_0", "block_1"):
        means = [(each[i][name] + each[i + 1][name]) / 2 for i in (0, 2)]
        assert [line[name] for line in pairs] == pytest.approx(means, rel=1e-5)


# --- stage 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "still"),
    [
        (lambda: tiny_vit(), {"classifier.weight", "classifier.bias"}),
        (lambda: tiny_vit(head=False), {"pooler.dense.weight", "pooler.dense.bias"}),
        (lambda: tiny_dinov2(), {"embeddings.mask_token"}),
    ],
    ids=["head", "pooler", "mask token"],
)
def test_stage_2_moves_the_whole_backbone_and_leaves_the_rest(tmp_path, teacher, still):
    teacher = teacher()
    student = student_of(teacher)
    teacher_before, before = copy_state(teacher), copy_state(student)
    trainer_of(FEATURES, tmp_path, student, teacher).train()
    assert still < before.keys()
    assert moved(before, copy_state(student)) == before.keys() - still
    assert_same_tensors(copy_state(teacher), teacher_before)
    assert not teacher.training


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_stage_2_loss_falls(tmp_path, loss):
    teacher, dataset = tiny_vit(), NoiseImages(8)
    settings = {"train_dataset": dataset, "eval_dataset": dataset, "loss": loss, "learning_rate": 3e-3}
    trainer = trainer_of(FEATURES, tmp_path, student_of(teacher), teacher, max_steps=20, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_cls"] < before["eval_cls"] and after["eval_patches"] < before["eval_patches"]


def test_stage_2_loss_is_the_relative_error_of_the_final_features(tmp_path):
    teacher, dataset = tiny_dinov2(), NoiseImages(8)
    student, pixels = student_of(teacher), batch_of(dataset)
    with torch.no_grad():
        ours, theirs = student(pixels).last_hidden_state, teacher(pixels).last_hidden_state
    expected = {}
    for name, tokens in {"cls": slice(0, 1), "patches": slice(1, None)}.items():
        variance = theirs[:, tokens].flatten(0, 1).var(dim=0, correction=0).mean()
        expected[name] = ((ours - theirs)[:, tokens].square().mean() / variance).item()
    weights = {"cls_weight": 3.0, "patch_weight": 1.0}
    trainer = trainer_of(FEATURES, tmp_path, student, teacher, train_dataset=dataset, max_steps=1, **weights)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["cls"] == pytest.approx(expected["cls"], rel=1e-4)
    assert first["patches"] == pytest.approx(expected["patches"], rel=1e-4)
    assert first["loss"] == pytest.approx(0.75 * expected["cls"] + 0.25 * expected["patches"], rel=1e-3)
    assert "registers" not in first


def block_outputs(model: PreTrainedModel, layers: nn.ModuleList, pixels: torch.Tensor) -> list[torch.Tensor]:
    kept = []
    handles = [layer.register_forward_hook(lambda module, args, output: kept.append(output)) for layer in layers]
    with torch.no_grad():
        model(pixels)
    for handle in handles:
        handle.remove()
    return kept


def test_stage_2_hidden_states_match_the_outputs_of_the_blocks(tmp_path):
    teacher, dataset = tiny_vit(layers=3), NoiseImages(8)
    student, pixels = student_of(teacher), batch_of(dataset)
    ours = block_outputs(student, student.vit.layers, pixels)
    theirs = block_outputs(teacher, teacher.vit.layers, pixels)
    expected = {}
    for layer in (0, 2):
        errors = []
        for tokens in (slice(0, 1), slice(1, None)):
            target = theirs[layer][:, tokens]
            error = (ours[layer][:, tokens] - target).square().mean()
            errors.append((error / target.flatten(0, 1).var(dim=0, correction=0).mean()).item())
        expected[f"hidden_{layer}"] = sum(errors) / 2
    settings = {"hidden_states": [0, -1], "hidden_states_weight": 0.5, "max_steps": 1, "train_dataset": dataset}
    trainer = trainer_of(FEATURES, tmp_path, student, teacher, **settings)
    trainer.train()
    first = trainer.state.log_history[0]
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    final = (first["cls"] + first["patches"]) / 2
    assert first["loss"] == pytest.approx(final + 0.5 * sum(expected.values()) / 2, rel=1e-3)


@pytest.mark.parametrize(("layers", "expected"), [(12, [2, 5, 8]), (4, [0, 1, 2]), (2, [0])])
def test_stage_2_matches_blocks_spread_over_the_depth_by_default(tmp_path, layers, expected):
    teacher = tiny_vit(layers=layers)
    trainer = trainer_of(FEATURES, tmp_path, student_of(teacher), teacher, hidden_states=None)
    assert trainer.layers == expected


def test_stage_2_with_lora_moves_the_adapters_alone_and_merges_into_a_plain_student(tmp_path):
    teacher = tiny_vit()
    student = student_of(teacher)
    plain = copy_state(student)
    settings = {"peft_config": LoraConfig(**LORA), "learning_rate": 1e-2, "max_steps": 3}
    trainer = trainer_of(FEATURES, tmp_path, student, teacher, **settings)
    before = copy_state(trainer.model)
    trainer.train()
    adapters = names_with(("lora_",), before)
    assert moved(before, copy_state(trainer.model)) == adapters
    assert len(adapters) == 2 * 2 * 2
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {trainer.args.new_learning_rate}  # not that of pretrained parameters
    pixels = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        adapted = trainer.model.eval()(pixels).logits
        merged = trainer.model.merge_and_unload()
        torch.testing.assert_close(merged(pixels).logits, adapted, rtol=1e-4, atol=1e-4)
    changed = moved(plain, copy_state(merged))
    assert changed == names_with((".q_proj.weight", ".v_proj.weight"), plain)


def test_lora_run_leaves_a_plain_checkpoint(tmp_path):
    teacher = tiny_vit()
    student = student_of(teacher)
    names = student.state_dict().keys()
    args = FeatureAlignmentConfig(output_dir=str(tmp_path / "2"), max_steps=2, **QUIET)
    run_stage(
        STAGES[FEATURES],
        student,
        args,
        teacher_model=teacher,
        train_dataset=NoiseImages(8),
        peft_config=LoraConfig(**LORA),
    )
    saved = load_file(tmp_path / "2" / "model.safetensors")
    assert saved.keys() == names
    assert load_student(str(tmp_path / "2")).config.adala_stage == FEATURES
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_bf16_autocast_covers_teacher_and_student_and_leaves_the_weights_in_float32(tmp_path, stage):
    teacher = tiny_vit()
    student = student_of(teacher)
    dtypes: dict[str, torch.dtype] = {}

    def note(name: str):
        return lambda module, args, output: dtypes.update({name: output.dtype})

    for name, model in {"teacher": teacher, "student": student}.items():
        model.vit.layers[0].attention.q_proj.register_forward_hook(note(name))
    trainer = trainer_of(stage, tmp_path, student, teacher, bf16=True, max_steps=1)
    trainer.train()
    assert dtypes == {"teacher": torch.bfloat16, "student": torch.bfloat16}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))


# --- stage 3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "softmax"])
def test_stage_3_learns_labels_and_reports_accuracy(tmp_path, linear):
    model, dataset = tiny_vit(), NoiseImages(16)
    model = student_of(model) if linear else model.requires_grad_(True)
    before = copy_state(model)
    settings = {"train_dataset": dataset, "eval_dataset": dataset, "max_steps": 30, "learning_rate": 3e-3}
    trainer = trainer_of(SUPERVISED, tmp_path, model, **settings)
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    with torch.no_grad():
        predicted = model.eval()(batch_of(dataset)).logits.argmax(dim=-1)
    assert end["eval_accuracy"] == pytest.approx((predicted == dataset.labels).float().mean().item(), abs=1e-6)
    assert end["eval_accuracy"] > start["eval_accuracy"]
    assert end["eval_loss"] < 0.7 * start["eval_loss"]
    assert moved(before, copy_state(model)) == before.keys()


def test_stage_3_with_a_frozen_backbone_trains_the_head_alone(tmp_path):
    model = student_of(tiny_vit())
    before = copy_state(model)
    trainer_of(SUPERVISED, tmp_path, model, freeze_backbone=True).train()
    assert moved(before, copy_state(model)) == {"classifier.weight", "classifier.bias"}


# --- all stages: accumulation, evaluation, data ----------------------------------------------------------------------


def setting_of(stage: str) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """A fresh student, always with the same weights, and the teacher of the stages that have one."""
    teacher = tiny_vit()
    student = student_of(teacher)
    return student, None if stage == SUPERVISED else teacher


@pytest.mark.parametrize("stage", STAGES)
def test_accumulating_small_batches_gives_the_gradient_of_the_large_one(tmp_path, stage):
    gradients = []
    for size, accumulation in ((8, 1), (2, 4)):
        student, teacher = setting_of(stage)
        keep = KeepGradients()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        settings |= {"max_steps": 1, "max_grad_norm": 0.0, "calibration_images": 8}
        if stage == SUPERVISED:
            settings.pop("calibration_images")
        trainer = trainer_of(stage, tmp_path, student, teacher, callbacks=[keep], **settings)
        trainer.train()
        gradients.append((keep.gradients, trainer.state.log_history[0]["loss"]))
    (whole, whole_loss), (accumulated, accumulated_loss) = gradients
    assert accumulated_loss == pytest.approx(whole_loss, rel=1e-5)
    assert whole.keys() == accumulated.keys() and len(whole) >= 12
    for name, gradient in whole.items():
        # absolute beside the largest of the tensor: entries near zero are rounding
        tolerance = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-5, atol=tolerance, msg=lambda m, n=name: n + m)
        assert gradient.abs().max() > 0, name


def test_evaluation_of_stage_1_gives_the_loss_by_hand(tmp_path):
    teacher, dataset = tiny_vit(), NoiseImages(6, labels=False)
    student = student_of(teacher)
    settings = {"train_dataset": dataset, "eval_dataset": dataset, "per_device_eval_batch_size": 4}
    metrics = trainer_of(ATTENTION, tmp_path, student, teacher, **settings).evaluate()
    expected = block_losses_by_hand(teacher, student, batch_of(dataset), layers=[0, 1])
    assert metrics["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert {"eval_block_0", "eval_block_1"} <= metrics.keys()


def test_evaluation_of_stage_2_gives_the_loss_by_hand(tmp_path):
    teacher, dataset = tiny_dinov2(), NoiseImages(6, labels=False)
    student, pixels = student_of(teacher), batch_of(dataset)
    settings = {"train_dataset": dataset, "eval_dataset": dataset, "per_device_eval_batch_size": 4}
    metrics = trainer_of(FEATURES, tmp_path, student, teacher, **settings).evaluate()
    with torch.no_grad():
        error = (student(pixels).last_hidden_state - teacher(pixels).last_hidden_state).square()
        target = teacher(pixels).last_hidden_state
    expected = [
        (error[:, tokens].mean() / target[:, tokens].flatten(0, 1).var(dim=0, correction=0).mean()).item()
        for tokens in (slice(0, 1), slice(1, None))
    ]
    assert metrics["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_evaluation_between_steps_leaves_the_training_log_as_it_is(tmp_path):
    teacher = tiny_vit()
    logs = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": NoiseImages(4, seed=9)}):
        trainer = trainer_of(ATTENTION, tmp_path, student_of(teacher), teacher, max_steps=3, **settings)
        trainer.train()
        logs.append([line["block_0"] for line in trainer.state.log_history if "block_0" in line])
    assert len(logs[0]) == 3
    assert logs[0] == logs[1]


def test_every_epoch_has_its_own_augmentation(tmp_path):
    class Recording(NoiseImages):
        def __getitem__(self, index):
            seen.append(self.epoch)
            return super().__getitem__(index)

    seen: list[int] = []
    model = student_of(tiny_vit())
    trainer_of(
        SUPERVISED, tmp_path, model, train_dataset=Recording(8), per_device_train_batch_size=4, max_steps=5
    ).train()
    assert seen[:20] == [0] * 8 + [1] * 8 + [2] * 4


def test_empty_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="train_dataset is empty"):
        trainer_of(SUPERVISED, tmp_path, student_of(tiny_vit()), train_dataset=NoiseImages(0, labels=False))


# --- interruptions ---------------------------------------------------------------------------------------------------


def resumable(variant: str, folder: Path, **settings):
    """A trainer that saves every third of 7 steps, 2 steps an epoch, on data whose augmentation goes by the epoch."""
    stage = {"softmax": SUPERVISED, "lora": FEATURES}.get(variant, variant)
    student, teacher = setting_of(stage)
    if variant == "softmax":
        student = tiny_vit()
    if variant == "lora":
        settings["peft_config"] = LoraConfig(**LORA)
    settings = {"max_steps": 7, "save_steps": 3, "save_strategy": "steps", "learning_rate": 1e-3} | settings
    settings |= {"train_dataset": NoiseImages(8, augment=True), "per_device_train_batch_size": 4}
    return trainer_of(stage, folder, student, teacher, **settings)


def interrupt(variant: str, folder: Path, step: int, **settings) -> None:
    with pytest.raises(Interrupted):
        resumable(variant, folder, callbacks=[InterruptAt(step)], **settings).train()


@pytest.mark.parametrize("variant", [*STAGES, "softmax", "lora"])
def test_resumed_run_ends_with_the_tensors_of_an_uninterrupted_one(tmp_path, variant):
    whole = resumable(variant, tmp_path / "whole")
    start = copy_state(whole.model)
    whole.train()
    interrupt(variant, tmp_path / "cut", step=5)
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == ["checkpoint-3"]
    resumed = resumable(variant, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert moved(start, copy_state(resumed.model))
    assert_same_tensors(copy_state(resumed.model), copy_state(whole.model))
    losses = [
        [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_resuming_where_there_is_nothing_starts_from_the_beginning(tmp_path):
    trainer = resumable(FEATURES, tmp_path / "new", max_steps=1)
    assert trainer.train(resume_from_checkpoint=True).global_step == 1


class States(TrainerCallback):
    """Keeps the model as it was after each step."""

    def __init__(self):
        self.after: dict[int, dict] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = copy_state(model)


@pytest.mark.parametrize("variant", [SUPERVISED, "softmax"])
@pytest.mark.parametrize("cut", [False, True], ids=["at once", "resumed"])
def test_load_best_model_at_end_restores_every_tensor_of_the_best_checkpoint(tmp_path, variant, cut):
    scores = {2: 0.1, 4: 0.9, 6: 0.5, 7: 0.3}

    def build(states):
        trainer = resumable(
            variant,
            tmp_path,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            eval_dataset=NoiseImages(4),
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            compute_metrics=lambda _: {"accuracy": scores[trainer.state.global_step]},
            callbacks=[states, InterruptAt(5 if cut and not list_checkpoints(tmp_path) else -1)],
        )
        return trainer

    states = States()
    if cut:
        with pytest.raises(Interrupted):
            build(states).train()
    trainer = build(states)
    trainer.train(resume_from_checkpoint=True)
    final = copy_state(trainer.model)
    assert_same_tensors(final, states.after[4])
    assert moved(states.after[7], states.after[4])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4").is_dir()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_with_disk_full(monkeypatch, where: str, step: int) -> None:
    """From checkpoint-`step` on, the named write leaves half a file and fails."""
    original = torch.save if where == "torch.save" else PreTrainedModel.save_pretrained

    def torch_save(obj, file, *args, **kwargs):
        if f"checkpoint-{step}" not in str(file):
            return original(obj, file, *args, **kwargs)
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    def save_pretrained(self, folder, *args, **kwargs):
        if f"checkpoint-{step}" not in str(folder):
            return original(self, folder, *args, **kwargs)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if where == "torch.save":
        monkeypatch.setattr(torch, "save", torch_save)
    else:
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)


@pytest.mark.parametrize("where", ["torch.save", "safetensors"])
def test_full_disk_ends_in_one_line_and_leaves_the_checkpoint_before_to_go_on_from(tmp_path, monkeypatch, where):
    whole = resumable(FEATURES, tmp_path / "whole")
    whole.train()
    with monkeypatch.context() as patch:
        fail_with_disk_full(patch, where, step=6)
        with pytest.raises(CheckpointError, match="disk is full") as error:
            resumable(FEATURES, tmp_path / "full").train()
    assert "\n" not in str(error.value)
    assert str(tmp_path / "full" / "checkpoint-6") in str(error.value)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["checkpoint-3"]
    resumed = resumable(FEATURES, tmp_path / "full")
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(copy_state(resumed.model), copy_state(whole.model))
    assert [path.name for path in list_checkpoints(tmp_path / "full")] == ["checkpoint-6", "checkpoint-7"]


def test_full_disk_does_not_touch_the_checkpoint_before(tmp_path, monkeypatch):
    interrupt(ATTENTION, tmp_path, step=5)
    before = files_of(tmp_path)
    assert {name.split("/")[0] for name in before} == {"checkpoint-3"}
    fail_with_disk_full(monkeypatch, "torch.save", step=6)
    with pytest.raises(CheckpointError):
        resumable(ATTENTION, tmp_path).train(resume_from_checkpoint=True)
    assert files_of(tmp_path) == before


def test_full_disk_at_the_end_of_a_stage_keeps_what_it_takes_to_go_on(tmp_path, monkeypatch):
    def run():
        student, teacher = setting_of(ATTENTION)
        args = AttentionAlignmentConfig(output_dir=str(tmp_path / "1"), max_steps=2, **QUIET)
        return run_stage(STAGES[ATTENTION], student, args, teacher_model=teacher, train_dataset=NoiseImages(8))

    with monkeypatch.context() as patch:
        original = PreTrainedModel.save_pretrained

        def save_pretrained(self, folder, *args, **kwargs):
            if "checkpoint-" in str(folder):
                return original(self, folder, *args, **kwargs)
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
        with pytest.raises(CheckpointError, match="disk is full"):
            run()
    left = ["checkpoints", "manifest.json", "metrics.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == left
    result = run()
    assert (result.resumed_from_step, result.steps) == (2, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    left = {path.name for path in (tmp_path / "1").iterdir()}
    assert {"config.json", "model.safetensors", "manifest.json", "metrics.jsonl"} <= left
    assert not {"checkpoints", ".writing", ".lock"} & left
    steps = [line["step"] for line in read_metrics(tmp_path / "1" / "metrics.jsonl") if "loss" in line]
    summaries = [line for line in read_metrics(tmp_path / "1" / "metrics.jsonl") if "train_runtime" in line]
    assert steps == sorted(set(steps)) and len(summaries) == 1


def test_errors_that_are_not_about_writing_keep_their_type(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        resumable(ATTENTION, tmp_path).train()


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoint_holds_the_student_and_nothing_of_the_teacher(tmp_path, stage):
    interrupt(stage, tmp_path, step=4)
    student, _ = setting_of(stage)
    folder = tmp_path / "checkpoint-3"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(student.state_dict())
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]
    trained = 12 if stage == ATTENTION else sum(1 for _ in student.parameters()) - (2 if stage == FEATURES else 0)
    assert len(torch.load(folder / "optimizer.pt", weights_only=True)["state"]) == trained


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_metrics_file_of_a_resumed_run_reads_like_that_of_an_uninterrupted_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"evaluation": "teacher", "accuracy": 1.0})
    for step in (5, -1):
        trainer = resumable(
            SUPERVISED, tmp_path / "cut", callbacks=[MetricsFileCallback(path, "supervised"), InterruptAt(step)]
        )
        if step > 0:
            with pytest.raises(Interrupted):
                trainer.train()
            with path.open("a") as file:  # a line cut short
                file.write('{"stage": "supervised", "step": 5, "lo')
        else:
            trainer.train(resume_from_checkpoint=True)
    lines = read_metrics(path)
    assert len(lines) == len(path.read_text().splitlines())
    assert lines[0] == {"evaluation": "teacher", "accuracy": 1.0}
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in lines if "loss" in line] == [
        line["loss"] for line in trainer.state.log_history if "loss" in line
    ]


def test_line_after_a_torn_one_can_be_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    append_metrics(path, {"evaluation": "teacher"})
    append_metrics(path, {"evaluation": "converted"})
    assert read_metrics(path) == [{"step": 1}, {"evaluation": "teacher"}, {"evaluation": "converted"}]


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: tiny_vit(layers=3), "num_hidden_layers"),
        (lambda: tiny_vit(hidden_size=64), "hidden_size"),
        (lambda: tiny_vit(num_attention_heads=4), "num_attention_heads"),
        (lambda: tiny_dinov2(), "adala_dinov2"),
        (lambda: student_of(tiny_vit()), "linear-attention student"),
    ],
    ids=["depth", "width", "heads", "family", "student"],
)
def test_teacher_that_the_student_was_not_converted_from_is_refused(tmp_path, stage, teacher, message):
    with pytest.raises(UsageError, match=message):
        trainer_of(stage, tmp_path, student_of(tiny_vit()), teacher())


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_metrics_that_would_be_ignored_are_refused(tmp_path, stage):
    teacher = tiny_vit()
    with pytest.raises(UsageError, match="compute_metrics"):
        trainer_of(stage, tmp_path, student_of(teacher), teacher, compute_metrics=lambda prediction: {})


def test_stage_1_without_a_linear_layer_is_refused(tmp_path):
    teacher = tiny_vit()
    with pytest.raises(UsageError, match="softmax_layers"):
        trainer_of(ATTENTION, tmp_path, student_of(teacher, softmax_layers=[0, 1]), teacher)


def test_stage_2_with_a_layer_that_does_not_exist_is_refused(tmp_path):
    teacher = tiny_vit()
    with pytest.raises(UsageError, match=r"layers 0 to 1"):
        trainer_of(FEATURES, tmp_path, student_of(teacher), teacher, hidden_states=[2])


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (AttentionAlignmentConfig, {"learning_rate": -1e-3}, "learning_rate=-0.001"),
        (AttentionAlignmentConfig, {"calibration_images": 0}, "calibration_images=0"),
        (FeatureAlignmentConfig, {"calibration_images": -1}, "calibration_images=-1"),
        (FeatureAlignmentConfig, {"loss": "l2"}, "loss='l2'"),
        (FeatureAlignmentConfig, {"patch_weight": -1.0}, "patch_weight=-1.0 must be 0 or more"),
        (FeatureAlignmentConfig, {"cls_weight": 0.0, "patch_weight": 0.0}, "cls_weight=0 and patch_weight=0"),
        (FeatureAlignmentConfig, {"hidden_states_weight": -1.0}, "hidden_states_weight=-1.0"),
        (SupervisedConfig, {"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, config, settings, message):
    with pytest.raises(UsageError, match=message):
        config(output_dir=str(tmp_path), **{**QUIET, **settings})
