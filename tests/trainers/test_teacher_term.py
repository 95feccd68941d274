"""Stage 3 with a teacher: its terms by hand, what trains and what does not, and what it refuses."""

import copy

import pytest
import torch
from family_helpers import CASES, stock_model
from safetensors.torch import load_file
from torch.nn import functional as F
from training_helpers import (
    QUIET,
    NoiseImages,
    assert_same_tensors,
    copy_state,
    moved,
    save_teacher,
    tiny_dinov2,
    tiny_vit,
)

from modeling_adala import UsageError, convert
from modeling_adala.inspection.towers import forward_features
from modeling_adala.modeling_adala import MODELS
from trainers import SupervisedConfig, SupervisedTrainer
from trainers.teacher_term import CLASSIFYING, TeacherTerm

CLASSIFIERS = [name for name, head in CASES if head == "ForImageClassification"]
SEGMENTERS = [name for name, head in CASES if head == "ForSemanticSegmentation"]


def linear(teacher, **options):
    return convert(teacher, check_parity=False, feature_map="elu", **options)


def trainer_of(folder, student, teacher, dataset=None, **settings) -> SupervisedTrainer:
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 1} | settings
    args = SupervisedConfig(output_dir=str(folder), **QUIET | settings)
    return SupervisedTrainer(student, args, teacher_model=teacher, train_dataset=dataset or NoiseImages(8))


def first_log(trainer: SupervisedTrainer) -> dict[str, float]:
    trainer.train()
    return next(line for line in trainer.state.log_history if "loss" in line)


def test_terms_are_what_a_calculation_by_hand_gives(tmp_path):
    teacher, dataset = tiny_vit(), NoiseImages(8)
    student = linear(teacher)
    pixels = torch.stack([item["pixel_values"] for item in dataset])
    with torch.no_grad():
        ours, theirs = (model(pixels, interpolate_pos_encoding=True).logits.double() for model in (student, teacher))
        probabilities = theirs.softmax(-1)
        divergence = (probabilities * (probabilities.log() - ours.log_softmax(-1))).sum(-1).mean()
        x, y = (forward_features(model, pixels).double() for model in (student, teacher))
        errors = []
        for group in (slice(0, 1), slice(1, None)):
            variance = y[:, group].flatten(0, 1).var(dim=0, correction=0).mean()
            errors.append((x[:, group] - y[:, group]).square().mean() / variance)
    log = first_log(trainer_of(tmp_path, student, teacher, dataset, max_steps=1, teacher_logits_weight=2.0))
    assert log["teacher_logits"] == pytest.approx(2 * divergence.item(), rel=1e-4)
    assert log["teacher_features"] == pytest.approx(sum(errors).item() / 2, rel=1e-4)
    assert log["loss"] == pytest.approx(log["labels"] + log["teacher_logits"] + log["teacher_features"], rel=1e-4)


def test_gradients_are_those_of_the_sum(tmp_path):
    teacher, dataset = tiny_vit(), NoiseImages(8)
    student = linear(teacher)
    batch = {"pixel_values": torch.stack([item["pixel_values"] for item in dataset])}
    labels = torch.tensor([int(item["labels"]) for item in dataset])
    trainer = trainer_of(tmp_path, student, teacher, dataset)
    trainer.model.train()
    trainer.compute_loss(trainer.model, {**batch, "labels": labels}).backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    logits = student(**batch, interpolate_pos_encoding=True).logits
    wanted, features = forward_features(teacher, **batch), forward_features(student, **batch)
    loss = F.cross_entropy(logits, labels)
    scores = teacher(**batch, interpolate_pos_encoding=True).logits
    loss += F.kl_div(logits.log_softmax(-1), scores.softmax(-1), reduction="batchmean")
    for group in (slice(0, 1), slice(1, None)):
        x, y = features[:, group], wanted[:, group]
        loss += F.mse_loss(x, y) / y.flatten(0, 1).var(dim=0, correction=0).mean() / 2
    loss.backward()
    assert len(found) > 20
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, student.get_parameter(name).grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_family_of_classifiers_agrees_with_itself_and_learns_from_its_teacher(name, tmp_path):
    teacher = stock_model(name, "ForImageClassification")
    images = [{"pixel_values": pixels, "labels": torch.tensor(0)} for pixels in torch.randn(8, 3, 32, 32)]
    twin = convert(teacher, check_parity=False)
    twin.set_attn_implementation("sdpa")
    log = first_log(trainer_of(tmp_path, twin, teacher, images, max_steps=1))
    assert log["teacher_logits"] == pytest.approx(0, abs=1e-5) and log["teacher_features"] == pytest.approx(
        0, abs=1e-5
    )
    before = copy_state(teacher)
    settings = {"max_steps": 20, "learning_rate": 3e-3, "teacher_features_weight": 10.0}
    trainer = trainer_of(tmp_path, linear(teacher), teacher, images, **settings)
    trainer.train()
    features = [line["teacher_features"] for line in trainer.state.log_history if "teacher_features" in line]
    assert features[-1] < 0.8 * features[0]
    assert_same_tensors(copy_state(teacher), before)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_family_of_segmenters_learns_from_a_backbone_and_from_a_segmenter(name, tmp_path):
    teacher = stock_model(name)
    segmenter_class = MODELS[name]["ForSemanticSegmentation"]
    config = linear(teacher).config
    config.num_labels = 3
    torch.manual_seed(0)
    student = segmenter_class(config).eval()
    softmax = copy.deepcopy(student)
    softmax.set_attn_implementation("sdpa")
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(3, (32, 32))} for _ in range(8)]
    log = first_log(trainer_of(tmp_path, copy.deepcopy(student), teacher, images, max_steps=1))
    assert log["teacher_features"] > 0 and "teacher_logits" not in log
    log = first_log(trainer_of(tmp_path, student, softmax, images, max_steps=1))
    assert log["teacher_features"] > 0 and log["teacher_logits"] > 0


def test_evaluation_knows_the_labels_alone(tmp_path):
    teacher, dataset = tiny_vit(), NoiseImages(8)
    student = linear(teacher)
    plain = SupervisedConfig(output_dir=str(tmp_path), **QUIET)
    alone = SupervisedTrainer(student, plain, eval_dataset=dataset).evaluate()["eval_loss"]
    trainer = trainer_of(tmp_path, student, teacher)
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(alone, rel=1e-6)


def test_the_teacher_is_in_no_checkpoint_and_a_name_opens_it(tmp_path):
    folder = save_teacher(tmp_path / "teacher")
    student = linear(tiny_vit())
    before, names = copy_state(student), set(student.state_dict())
    trainer = trainer_of(tmp_path / "out", student, folder)
    trainer.train()
    trainer.save_model()
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == names
    assert any("q_proj" in name for name in moved(before, copy_state(student)))


def test_other_classes_leave_the_features(tmp_path):
    teacher = tiny_vit()
    student = linear(tiny_vit(head=True))
    student.config.id2label = {index: f"other {index}" for index in range(10)}
    log = first_log(trainer_of(tmp_path, student, teacher, max_steps=1))
    assert log["teacher_features"] > 0 and "teacher_logits" not in log
    with pytest.raises(UsageError, match=r"teacher_logits_weight=1 needs a teacher with a head of these classes"):
        trainer_of(tmp_path, student, teacher, teacher_logits_weight=1.0)
    with pytest.raises(UsageError, match="leaves nothing to learn from"):
        trainer_of(tmp_path, student, teacher, teacher_features_weight=0.0)


def test_weights_without_a_teacher_and_teachers_of_another_shape_are_refused(tmp_path):
    student = linear(tiny_vit())
    with pytest.raises(UsageError, match=r"teacher_features_weight=0\.5 needs a teacher"):
        trainer_of(tmp_path, student, None, teacher_features_weight=0.5)
    with pytest.raises(UsageError, match="the model that is trained"):
        trainer_of(tmp_path, student, student)
    with pytest.raises(UsageError, match="num_hidden_layers"):
        trainer_of(tmp_path, student, tiny_vit(layers=3))
    with pytest.raises(UsageError, match="type"):
        trainer_of(tmp_path, student, tiny_dinov2())
    with pytest.raises(UsageError, match="must be 0 or more"):
        trainer_of(tmp_path, student, tiny_vit(), teacher_logits_weight=-1.0)


def test_a_term_of_features_alone_runs_no_head():
    teacher = tiny_vit()
    term = TeacherTerm(teacher, linear(teacher), 0.0, 1.0)
    teacher.classifier.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    pixels = torch.randn(2, 1, 28, 28)
    assert set(term(pixels, torch.randn(2, 10), forward_features(teacher, pixels))) == {"teacher_features"}
    assert set(CLASSIFYING) <= {head for heads in MODELS.values() for head in heads}
