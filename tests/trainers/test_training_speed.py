"""What stages 1 and 2 spare themselves, that it changes no number, and what they say about their cost."""

import gc
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_helpers import stock_model
from torch import nn
from training_helpers import QUIET, NoiseImages, copy_state, tiny_dinov2, tiny_vit
from transformers import PreTrainedModel, TrainerCallback

from modeling_adala import convert
from modeling_adala.inspection.towers import attention_modules, forward_tower
from modeling_adala.modeling_adala import MODELS
from trainers.early_gradients import early_gradients
from trainers.runs import callbacks
from trainers.runs.callbacks import cost_in_words, read_metrics
from trainers.runs.memory import peak_memory, reset_peak_memory
from trainers.runs.stages import STAGES, run_stage
from trainers.teacher import output_projection, visit_attention, with_cast_weights, without_output_projection

ATTENTION, FEATURES, SUPERVISED = STAGES
CPU = torch.device("cpu")


def student_of(teacher: PreTrainedModel, **options) -> PreTrainedModel:
    return convert(teacher, check_parity=False, **{"feature_map": "elu", **options})


def trainer_of(stage: str, folder: Path, teacher: PreTrainedModel, *, dataset=None, callbacks=None, **settings):
    student = student_of(teacher, softmax_layers=settings.pop("softmax_layers", []))
    defaults = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 1}
    args = STAGES[stage].config_class(output_dir=str(folder), **{**QUIET, **defaults, **settings})
    kwargs = {} if stage == SUPERVISED else {"teacher_model": teacher}
    dataset = dataset or NoiseImages(8)
    return STAGES[stage].trainer_class(model=student, args=args, train_dataset=dataset, callbacks=callbacks, **kwargs)


# --- gradients as they come ------------------------------------------------------------------------------------------


def two_losses(weights: list[nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in weights]
    return [(x @ weight).square().mean() for x, weight in zip(data, weights, strict=True)]


def parameters(count: int = 2) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64)) for _ in range(count)]


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_early_gradients_are_those_of_one_backward_over_the_sum(scale):
    """Twice, as with two accumulated batches; each divided by 2, and multiplied by the loss scale if there is one."""
    plain, early = parameters(), parameters()
    for _ in range(2):
        (sum(two_losses(plain)) / 2 * (scale or 1)).backward()
        factor = None if scale is None else lambda x: x * scale
        loss = sum(early_gradients(loss, [weight], factor) for loss, weight in zip(two_losses(early), early))
        assert loss.item() == pytest.approx(sum(two_losses(plain)).item(), rel=1e-12)
        (loss / 2 * (scale or 1)).backward()
    for expected, found in zip(plain, early, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0)
        assert found.grad.abs().max() > 0.1


def test_early_gradients_scale_the_loss_before_they_go_back():
    """1e-6 times 0.01 would be zero in float16."""
    weight, scale = nn.Parameter(torch.ones(1, dtype=torch.float16)), 2.0**14
    loss = (weight * 1e-6 * torch.tensor(0.01, dtype=torch.float16)).float().sum()
    (early_gradients(loss, [weight], lambda x: x * scale) * scale).backward()
    assert weight.grad.item() > 0


def test_overflow_of_the_loss_scale_reaches_the_gradients():
    """As inf or NaN, which is how a gradient scaler learns that it must skip the step."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    loss = early_gradients((weight * 2).float().sum(), [weight], lambda x: x * 2.0**17)
    (loss * 2.0**17).backward()
    assert not weight.grad.isfinite().all()


def test_without_gradients_the_loss_is_a_number():
    with torch.no_grad():
        loss = early_gradients(two_losses(parameters())[0], [])
    assert not loss.requires_grad and loss > 0


def test_parameter_that_a_loss_does_not_use_gets_zeros():
    used, unused = parameters()
    early_gradients(used.square().sum(), [used, unused]).backward()
    assert unused.grad.abs().max() == 0
    torch.testing.assert_close(used.grad, 2 * used.detach())


# --- what is kept and what does not run ------------------------------------------------------------------------------


class SavedForBackward:
    """Counts the bytes that autograd holds, and the most it has held at once."""

    def __init__(self):
        self.alive = self.peak = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def pack(self, tensor):
        return _Held(self, tensor)


class _Held:
    def __init__(self, counter, tensor):
        self.counter, self.tensor = counter, tensor
        counter.alive += tensor.nbytes
        counter.peak = max(counter.peak, counter.alive)

    def __del__(self):
        self.counter.alive -= self.tensor.nbytes


def saved_at_most(folder: Path, stage: str, layers: int) -> int:
    trainer = trainer_of(stage, folder, tiny_vit(layers=layers), calibration_images=4)
    trainer.variances()
    saved, pixels = SavedForBackward(), torch.randn(8, 1, 28, 28)
    with saved.hooks:
        loss = trainer.compute_loss(trainer.model, {"pixel_values": pixels})
        loss.backward()
    del loss
    assert saved.alive == 0
    return saved.peak


def test_stage_1_keeps_the_activations_of_one_block_whatever_the_depth(tmp_path):
    shallow, deep = (saved_at_most(tmp_path, ATTENTION, layers) for layers in (2, 8))
    assert deep == shallow > 0
    # the counter counts: stage 2 has to keep all of them
    shallow, deep = (saved_at_most(tmp_path, FEATURES, layers) for layers in (2, 8))
    assert deep > 3 * shallow


def live_tensors() -> int:
    gc.collect()
    # the type, not `isinstance`: that asks an object for its class, and a proxy whose object has gone raises
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def test_calibration_keeps_no_outputs(tmp_path):
    """Twice the images, the same number of live tensors at each batch."""
    counts = []
    for images in (8, 16):
        trainer = trainer_of(
            ATTENTION,
            tmp_path,
            tiny_vit(),
            dataset=NoiseImages(16),
            calibration_images=images,
            per_device_train_batch_size=4,
        )
        seen = []
        trainer.teacher_model.vit.embeddings.register_forward_hook(lambda *_, seen=seen: seen.append(live_tensors()))
        trainer.variances()
        counts.append(seen[-1] - seen[1])
    assert counts == [0, 0]


@pytest.mark.parametrize(("softmax_layers", "attentions", "mlps"), [([], 3, 2), ([2], 2, 1), ([0], 3, 2)])
def test_teacher_stops_after_the_last_linear_layers_attention(tmp_path, softmax_layers, attentions, mlps):
    teacher, calls = tiny_vit(layers=3), {"attention": 0, "mlp": 0, "norm": 0}

    def count(name: str):
        return lambda *_: calls.update({name: calls[name] + 1})

    for layer in teacher.vit.layers:
        layer.attention.register_forward_hook(count("attention"))
        layer.mlp.register_forward_hook(count("mlp"))
    teacher.vit.layernorm.register_forward_hook(count("norm"))
    trainer = trainer_of(ATTENTION, tmp_path, teacher, softmax_layers=softmax_layers, calibration_images=8)
    trainer.variances()
    calls.update(dict.fromkeys(calls, 0))
    trainer.compute_loss(trainer.model, {"pixel_values": torch.randn(4, 1, 28, 28)})
    assert calls == {"attention": attentions, "mlp": mlps, "norm": 0}
    with torch.no_grad():  # and leaves the teacher as it was
        assert forward_tower(teacher, torch.randn(1, 1, 28, 28)).last_hidden_state.shape == (1, 17, 32)
    assert calls["norm"] == 1


@pytest.mark.parametrize("name", MODELS)
def test_what_the_teachers_heads_give_is_what_its_output_projection_takes(name):
    """Nothing comes between or after, in any family: else a loss before the projection would be another loss."""
    teacher = stock_model(name)
    modules, taps = attention_modules(teacher), {}
    visit_attention(teacher, torch.randn(2, 3, 32, 32), [0, 1], taps.__setitem__)
    assert list(taps) == [0, 1]
    with torch.no_grad():
        for layer, tap in taps.items():
            assert torch.equal(output_projection(modules[layer])(tap.context), tap.output)
            with without_output_projection(modules[layer]):
                assert torch.equal(modules[layer](*tap.args, **tap.kwargs)[0], tap.context)
            assert torch.equal(modules[layer](*tap.args, **tap.kwargs)[0], tap.output)


def test_stage_1_with_an_output_projection_of_its_own_compares_after_it(tmp_path):
    """The gradient is that of the outputs' error, though the teacher's projection is another one."""
    teacher = tiny_vit(layers=1)
    trainer = trainer_of(ATTENTION, tmp_path, teacher)
    with torch.no_grad():
        trainer.model.vit.layers[0].attention.o_proj.weight.mul_(1.5)
    pixels, gradients, losses = torch.randn(4, 1, 28, 28), [], []
    own, theirs = (model.vit.layers[0].attention for model in (trainer.model, teacher))
    with torch.no_grad():
        hidden_states = teacher.vit.layers[0].layernorm_before(teacher.vit.embeddings(pixels))
        target = theirs(hidden_states)[0]
    by_hand = (own(hidden_states, patch_grid=(4, 4))[0] - target).square().mean() / trainer.variances()[0]
    for loss in (by_hand, trainer.compute_loss(trainer.model, {"pixel_values": pixels})):
        trainer.model.zero_grad()
        loss.backward()
        gradients.append(own.q_proj.weight.grad.clone())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_bf16_gradients_before_the_projection_are_as_good_as_those_after_it(tmp_path):
    teacher, pixels, found = tiny_vit(), torch.randn(8, 1, 28, 28), {}
    for kind, bf16 in (("exact", False), ("before", True), ("after", True)):
        trainer = trainer_of(ATTENTION, tmp_path, teacher, bf16=bf16)
        trainer._grams = dict.fromkeys(trainer.layers) if kind == "after" else None
        trainer.variances()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, {"pixel_values": pixels})
        loss.backward()
        found[kind] = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    for name, exact in found["exact"].items():
        before, after = ((found[kind][name] - exact).norm() / exact.norm() for kind in ("before", "after"))
        assert before < 1.5 * after + 2e-3, name
        assert before < 0.05, name


def test_error_in_a_visit_is_not_swallowed_and_leaves_no_hooks():
    teacher = tiny_vit()

    def fail(*args):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        visit_attention(teacher, torch.randn(1, 1, 28, 28), [0], fail)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.vit.layers.modules())


# --- the teacher's weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_vit, tiny_dinov2])
def test_cast_weights_give_the_targets_of_autocast_bit_for_bit(make):
    teacher, pixels = make(), torch.randn(3, 1, 28, 28)
    before, cast = copy_state(teacher), with_cast_weights(teacher, torch.bfloat16)
    outputs = []
    for model in (teacher, cast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(forward_tower(model, pixels, output_hidden_states=True).hidden_states)
    for expected, found in zip(*outputs, strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        exact = forward_tower(teacher, pixels).last_hidden_state
    assert not torch.equal(exact, outputs[0][-1])  # autocast was on
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy_state(teacher).items())


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_bf16_trainer_holds_a_cast_copy_and_leaves_the_users_teacher_alone(tmp_path, stage):
    teacher = tiny_vit()
    trainer = trainer_of(stage, tmp_path, teacher, bf16=True)
    trainer.train()
    dtypes = {name: parameter.dtype for name, parameter in trainer.teacher_model.named_parameters()}
    assert dtypes["vit.layers.0.attention.q_proj.weight"] == torch.bfloat16
    assert dtypes["vit.layers.0.layernorm_before.weight"] == torch.float32
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_float32_trainer_uses_the_users_teacher_itself(tmp_path):
    teacher = tiny_vit()
    assert trainer_of(ATTENTION, tmp_path, teacher).teacher_model is teacher


# --- cost ------------------------------------------------------------------------------------------------------------


class SlowImages(NoiseImages):
    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)


class SlowSteps(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        time.sleep(0.3)


@pytest.fixture
def warned(monkeypatch, caplog) -> Callable[[], list[str]]:
    monkeypatch.setattr(callbacks, "WARNED_FROM_STEPS", 4)
    caplog.set_level(logging.WARNING, logger=callbacks.__name__)
    return lambda: [message for message in caplog.messages if "waiting for images" in message]


def test_waiting_for_slow_images_is_measured_logged_and_warned_of_once(tmp_path, warned):
    trainer = trainer_of(SUPERVISED, tmp_path, tiny_vit(), dataset=SlowImages(8), max_steps=8)
    trainer.train()
    logged = {line["step"]: line.get("data_wait_share") for line in trainer.state.log_history if "loss" in line}
    assert logged[1] is None and logged[2] is None  # warm-up
    assert all(0.2 < logged[step] < 1 for step in range(3, 9)), logged  # more on a machine with nothing else to do
    assert 0.2 < trainer.state.log_history[-1]["data_wait_share"] < 1
    (message,) = warned()
    assert "dataloader_num_workers (now 0)" in message


def test_fast_images_are_not_warned_of(tmp_path, warned):
    trainer = trainer_of(SUPERVISED, tmp_path, tiny_vit(), max_steps=6, callbacks=[SlowSteps()])
    trainer.train()
    assert 0 <= trainer.state.log_history[-1]["data_wait_share"] < 0.1
    assert not warned()


def test_time_between_the_steps_is_no_waiting(tmp_path):
    class SlowCheckpoints(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            time.sleep(0.2)

    trainer = trainer_of(
        SUPERVISED, tmp_path, tiny_vit(), dataset=SlowImages(8), max_steps=6, callbacks=[SlowCheckpoints()]
    )
    trainer.train()
    assert trainer.state.log_history[-1]["data_wait_share"] > 0.5


def test_peak_memory_is_that_since_the_reset():
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    assert before is not None
    block = torch.ones(64 * 2**20)
    assert peak_memory(CPU) - before > 200 * 2**20
    del block
    reset_peak_memory(CPU)
    assert peak_memory(CPU) - before < 100 * 2**20


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_cost_of_a_stage_is_in_its_last_line_and_its_manifest(tmp_path, stage):
    teacher = tiny_vit()
    args = STAGES[stage].config_class(output_dir=str(tmp_path / "1"), max_steps=4, logging_steps=1, **QUIET)
    result = run_stage(STAGES[stage], student_of(teacher), args, teacher_model=teacher, train_dataset=NoiseImages(8))
    last = [line for line in read_metrics(tmp_path / "1" / "metrics.jsonl") if "train_runtime" in line][-1]
    facts = json.loads((tmp_path / "1" / "manifest.json").read_text())["stages"][stage]
    for name in ("data_wait_share", "peak_memory_mib"):
        assert facts[name] == last[name] == result.metrics[name]
    assert 50 < facts["peak_memory_mib"] < 20_000
    assert cost_in_words(facts).endswith("GiB of memory")


def test_cost_in_words_says_what_is_known():
    assert cost_in_words({}) == ""
    assert cost_in_words({"data_wait_share": 0.0213}) == ", 2 % of them waiting for images"
    facts = {"data_wait_share": 0.0213, "peak_memory_mib": 1331}
    assert cost_in_words(facts) == ", 2 % of them waiting for images, at most 1.3 GiB of memory"
