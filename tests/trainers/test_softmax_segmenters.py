"""A softmax segmenter, which only this package has, is a teacher like any other."""

import pytest
import torch
from family_helpers import RECTANGULAR, inputs_of, stock_model
from training_helpers import QUIET, copy_state

from modeling_adala import UsageError, convert, load_segmenter, load_teacher
from modeling_adala.inspection.towers import attention_implementation
from modeling_adala.modeling_adala import MODELS
from trainers import (
    AttentionAlignmentConfig,
    AttentionAlignmentTrainer,
    FeatureAlignmentConfig,
    FeatureAlignmentTrainer,
)

FAMILIES = [name for name, heads in MODELS.items() if "ForSemanticSegmentation" in heads]
LABELS = ["road", "sky", "tree"]


def tuned(name: str, folder) -> str:
    """Folder of a softmax segmenter with a trained head."""
    stock_model(name).save_pretrained(folder / "stock")
    segmenter = load_segmenter(str(folder / "stock"), LABELS)
    torch.nn.init.normal_(segmenter.classifier.bias)
    segmenter.batch_norm.running_mean.normal_()
    segmenter.save_pretrained(folder / "tuned")
    return str(folder / "tuned")


@pytest.mark.parametrize("name", FAMILIES)
def test_its_student_has_its_head_and_learns_from_it(tmp_path, name):
    teacher = load_teacher(tuned(name, tmp_path))
    student = convert(teacher, feature_map="power", softmax_layers=[0])  # checks its features
    assert student.config.id2label == dict(enumerate(LABELS)) and student.config.linear_layers == [1]
    inputs = inputs_of(student, RECTANGULAR)
    with torch.no_grad(), attention_implementation(student, "sdpa"):
        torch.testing.assert_close(student(**inputs).logits, teacher(**inputs).logits, atol=1e-4, rtol=1e-4)
    images = [{"pixel_values": pixels} for pixels in inputs["pixel_values"]]
    before = copy_state(teacher)
    for config, trainer in (
        (AttentionAlignmentConfig, AttentionAlignmentTrainer),
        (FeatureAlignmentConfig, FeatureAlignmentTrainer),
    ):
        args = config(output_dir=str(tmp_path / "run"), max_steps=1, save_strategy="no", **QUIET)
        result = trainer(student, teacher, args, train_dataset=images).train()
        assert result.training_loss > 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())


def test_one_linear_layer_makes_it_a_student(tmp_path):
    student = convert(load_teacher(tuned("dinov2", tmp_path)), softmax_layers=[0], check_parity=False)
    student.save_pretrained(tmp_path / "student")
    for teacher in (student, str(tmp_path / "student")):
        with pytest.raises(UsageError, match="is a linear-attention student"):
            load_teacher(teacher)
