"""Softmax layers by measurement: the ranking is true, leaves no trace, and the chosen layers are the teacher's."""

import copy
import json

import pytest
import torch
from family_helpers import stock_model
from training_helpers import QUIET, assert_same_tensors, copy_state

from modeling_adala import UsageError, convert, load_student
from modeling_adala.inspection.towers import attention_modules, forward_features
from modeling_adala.modeling_adala import MODELS
from trainers import AttentionAlignmentConfig, AttentionAlignmentTrainer
from trainers.evaluation.softmax_layers import keep_softmax, rank_softmax_layers
from trainers.runs.settings import parse_softmax_layers


def trained_pair(name: str = "vit", layers: int = 3):
    """A teacher, and a student whose projections have moved away from it, the last layer's the most."""
    teacher = stock_model(name, num_hidden_layers=layers)
    student = convert(teacher, local_mixing=3)
    with torch.no_grad():
        for layer, module in enumerate(attention_modules(student)):
            torch.nn.init.normal_(module.local_mixing.weight, std=0.01)
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                projection.weight.add_(0.05 * (layer + 1) * torch.randn_like(projection.weight))
    return teacher, student


def pixels() -> list[torch.Tensor]:
    return list(torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", MODELS)
def test_each_figure_is_that_of_a_student_with_this_layer_in_softmax(name):
    teacher, student = trained_pair(name, layers=2)
    before, maps = copy_state(student), [module.feature_map for module in attention_modules(student)]
    ranking = rank_softmax_layers(student, teacher, pixels())
    assert_same_tensors(copy_state(student), before)
    assert [module.feature_map for module in attention_modules(student)] == maps
    assert set(ranking) == {-1, 0, 1} and list(ranking.values()) == sorted(ranking.values())
    for layer in (0, 1):
        alone = copy.deepcopy(student)
        keep_softmax(alone, teacher, [layer])
        assert rank_softmax_layers(alone, teacher, pixels())[-1] == pytest.approx(ranking[layer], rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_student_with_all_layers_in_softmax_is_its_teacher(name, tmp_path):
    teacher, student = trained_pair(name, layers=2)
    keep_softmax(student, teacher, [1, 0])
    images = pixels()[0]
    torch.testing.assert_close(forward_features(student, images), forward_features(teacher, images))
    student.save_pretrained(tmp_path)
    opened = load_student(str(tmp_path))
    assert not any(".local_mixing." in key or ".feature_map." in key for key in opened.state_dict())
    assert torch.equal(forward_features(opened, images), forward_features(student, images))


def test_the_trainer_keeps_the_layers_that_gain_the_most(tmp_path, caplog):
    teacher, student = trained_pair()
    images = [{"pixel_values": image} for batch in pixels() for image in batch]
    trainer = AttentionAlignmentTrainer(
        model=student,
        teacher_model=teacher,
        args=AttentionAlignmentConfig(
            output_dir=str(tmp_path),
            auto_softmax_layers=2,
            max_steps=1,
            save_strategy="no",
            learning_rate=1e-9,
            **QUIET,
        ),
        train_dataset=images,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "softmax_none" in line]
    assert len(lines) == 1
    errors = {int(key.removeprefix("softmax_")): lines[0][key] for key in lines[0] if key[-1].isdigit()}
    best = sorted(sorted(errors, key=errors.get)[:2])
    assert student.config.softmax_layers == best and best != [0, 1]  # the last has moved the most
    assert "softmax layers" in caplog.text and "none" in caplog.text
    assert [module.feature_map is None for module in attention_modules(student)] == [
        layer in best for layer in range(3)
    ]
    trainer.save_model(str(tmp_path / "model"))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["softmax_layers"] == best
    for layer in best:
        for name in ("q_proj", "k_proj", "v_proj"):
            ours, theirs = (getattr(attention_modules(m)[layer], name).weight for m in (student, teacher))
            assert torch.equal(ours, theirs)


def test_more_layers_than_there_are_and_adapters_are_refused(tmp_path):
    from peft import LoraConfig

    teacher, student = trained_pair()
    for count, peft in ((3, None), (1, LoraConfig(target_modules=["q_proj"]))):
        args = AttentionAlignmentConfig(output_dir=str(tmp_path), auto_softmax_layers=count, **QUIET)
        with pytest.raises(UsageError, match=f"auto_softmax_layers={count}: pass fewer than 3"):
            AttentionAlignmentTrainer(
                model=copy.deepcopy(student), teacher_model=teacher, args=args, peft_config=peft, train_dataset=[]
            )


def test_layers_and_counts_are_told_apart():
    assert parse_softmax_layers(None) == (None, 0)
    assert parse_softmax_layers([0, -1]) == ([0, -1], 0)
    assert parse_softmax_layers("auto:2") == (None, 2)
    for wrong in ("auto", "auto:0", "auto:-1", "auto:x", "all"):
        with pytest.raises(UsageError, match="auto:K"):
            parse_softmax_layers(wrong)
