"""Every family trains: stages 1 and 2 on the real trainers, and activation checkpointing with every head."""

import math

import pytest
import torch
from family_helpers import CASES, inputs_of, is_vision_text, stock_model, tensors, tiny_config
from training_helpers import QUIET, assert_same_tensors, copy_state, moved

from modeling_adala import convert
from modeling_adala.inspection.towers import attention_modules, vision_tower
from modeling_adala.modeling_adala import MODELS
from trainers.runs.stages import STAGES

ATTENTION, FEATURES, _ = STAGES


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
@pytest.mark.parametrize("name", MODELS)
def test_a_stage_trains_the_vision_tower_and_its_loss_falls(name, stage, tmp_path):
    teacher = stock_model(name)
    student = convert(teacher, check_parity=False, local_mixing=3)
    before, teacher_before = copy_state(student), copy_state(teacher)
    images = [{"pixel_values": pixels} for pixels in torch.randn(8, 3, 32, 32)]
    settings = {"max_steps": 20, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no"}
    trainer = STAGES[stage].trainer_class(
        model=student,
        teacher_model=teacher,
        args=STAGES[stage].config_class(output_dir=str(tmp_path), per_device_train_batch_size=8, **settings, **QUIET),
        train_dataset=images,
        eval_dataset=images,
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and all(math.isfinite(loss) for loss in losses)
    assert trainer.evaluate()["eval_loss"] < 0.8 * start

    changed = moved(before, copy_state(student))
    tower = {id(parameter) for parameter in vision_tower(student).parameters()}
    assert changed <= {key for key, parameter in student.named_parameters() if id(parameter) in tower}
    for part in ("q_proj.weight", "v_proj.weight", "feature_map.weight_q", "local_mixing.weight"):
        assert sum(part in key for key in changed) == 2, part
    assert any("norm" in key for key in changed) == (stage == FEATURES)
    assert_same_tensors(copy_state(teacher), teacher_before)
    if is_vision_text(name):  # bit-identical, and not for want of one
        text = [key for key in before if key.startswith("text_model.")]
        assert text and not changed & set(text)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(("name", "head"), CASES)
def test_activation_checkpointing_gives_the_same_gradients(name, head):
    torch.manual_seed(0)
    model = MODELS[name][head](tiny_config(MODELS[name]["Model"].config_class, local_mixing=3)).train()
    for name, parameter in model.named_parameters():
        if "token" in name:  # zeros as a query: relu gives them no gradient
            torch.nn.init.normal_(parameter)
    inputs, calls = inputs_of(model), []
    attention_modules(model)[0].q_proj.register_forward_hook(lambda *call: calls.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)  # DINOv3 jitters its positions
        calls.clear()
        sum(x.float().pow(2).mean() for x in tensors(model(**inputs))).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    again = gradients()
    assert len(calls) == 2
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-5, atol=1e-7)
    reached = [key for key in plain if plain[key].abs().max() > 0]
    for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "feature_map.weight_q"):
        assert sum(part in key and "text_model" not in key for key in reached) == 2, part
    # a head that reads the class token alone does not see the patches of the last layer
    assert "local_mixing.weight" in str(reached)
