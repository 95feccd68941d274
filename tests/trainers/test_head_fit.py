"""A new head starts where softmax regression on the frozen features ends; a trained one stays what it is."""

import pytest
import torch
from family_helpers import CASES, stock_model
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from training_helpers import (
    QUIET,
    InterruptAt,
    Interrupted,
    NoiseImages,
    assert_same_tensors,
    copy_state,
    moved,
    tiny_dinov2,
    tiny_vit,
)

from modeling_adala import AdaLAError, UsageError, convert
from modeling_adala.conversion.loading import load_segmenter
from trainers import SupervisedConfig, SupervisedTrainer
from trainers.head_fit import fit_head, head_layers, is_new

HEADS = [case for case in CASES if case[1] in ("ForImageClassification", "ForSemanticSegmentation")]


def trainer_of(folder, model, dataset=None, **settings) -> SupervisedTrainer:
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no"} | settings
    args = SupervisedConfig(output_dir=str(folder), **QUIET | settings)
    return SupervisedTrainer(model, args, train_dataset=dataset or NoiseImages(24))


def start_of(folder, model, dataset=None, **settings) -> set[str]:
    """Names of what the fit before the first step moves."""
    trainer, before = trainer_of(folder, model, dataset, **settings), copy_state(model)
    trainer.prepare_start()
    return moved(before, copy_state(model))


def test_a_classifier_starts_as_logistic_regression_on_its_features(tmp_path):
    dataset, model = NoiseImages(48), tiny_vit(new_head=True).eval()
    pixels = torch.stack([item["pixel_values"] for item in dataset])
    with torch.no_grad():
        features = model.vit(pixels).last_hidden_state[:, 0].double()
    x = (features - features.mean(dim=0)) / (features.var(dim=0, correction=0) + 1e-5).sqrt()
    reference = LogisticRegression(tol=1e-8, max_iter=2000).fit(x.numpy(), dataset.labels.numpy())
    assert start_of(tmp_path, model, dataset) == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        found = model(pixels).logits.softmax(dim=-1)[:, reference.classes_]
    torch.testing.assert_close(found.double(), torch.from_numpy(reference.predict_proba(x.numpy())), atol=2e-3, rtol=0)


def test_a_segmenter_standardizes_in_its_batch_norm_and_learns_the_masks(tmp_path):
    tiny_dinov2().save_pretrained(tmp_path / "teacher")
    model = load_segmenter(str(tmp_path / "teacher"), labels=["dark", "bright"]).eval()
    generator = torch.Generator().manual_seed(0)
    bright = torch.rand(32, 1, 4, 4, generator=generator) < 0.5
    bright = bright.repeat_interleave(7, 2).repeat_interleave(7, 3)
    pixels, masks = torch.where(bright, 2.0, -2.0), bright[:, 0].long()
    before, seen = copy_state(model), []
    model.batch_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batches = [{"pixel_values": p, "labels": m} for p, m in zip(pixels.split(8), masks.split(8), strict=True)]
    with torch.no_grad():
        assert fit_head(model, batches) == 32
        features = torch.cat(seen)
        torch.testing.assert_close(model.batch_norm.running_mean, features.mean(dim=(0, 2, 3)))
        torch.testing.assert_close(model.batch_norm.running_var, features.var(dim=(0, 2, 3), correction=0))
        right = F.interpolate(model(pixels).logits, (28, 28), mode="nearest").argmax(dim=1) == masks
    assert right.float().mean() > 0.95
    statistics = {f"batch_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved(before, copy_state(model)) == statistics | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_the_heads_of_all_families_are_known(name, head):
    student = convert(stock_model(name, head), head=head, check_parity=False)
    layers = head_layers(student)
    assert layers is not None and layers[1].weight.shape[0] == student.config.num_labels
    assert (layers[0] is None) == (head == "ForImageClassification")
    assert is_new(layers[1]) == (head == "ForSemanticSegmentation")  # the stock classifiers are random all over


def test_a_trained_head_stays_and_so_does_any_if_asked(tmp_path):
    assert start_of(tmp_path, tiny_vit(new_head=True), head_fit_images=0) == set()
    assert start_of(tmp_path, tiny_vit()) == set()


def test_a_trained_head_is_fitted_on_request_from_anywhere(tmp_path):
    heads = []
    for seed in (0, 1):
        model = tiny_vit()
        model.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
        names = start_of(tmp_path, model, refit_head=True)
        assert names == {"classifier.weight", "classifier.bias"}
        heads.append(copy_state(model.classifier))
    assert_same_tensors(*heads)
    with pytest.raises(UsageError, match="refit_head=True needs images"):
        SupervisedConfig(output_dir=str(tmp_path), refit_head=True, head_fit_images=0, **QUIET)


def test_labels_that_are_no_classes_are_left_to_the_loss(tmp_path):
    dataset = [{"pixel_values": torch.randn(1, 28, 28), "labels": torch.rand(10)} for _ in range(8)]
    assert start_of(tmp_path, tiny_vit(new_head=True), dataset) == set()


def test_a_run_fits_once_and_resumes_to_the_same_weights(tmp_path):
    dataset, whole = NoiseImages(24, augment=True), tiny_vit(new_head=True)
    trainer_of(tmp_path / "whole", whole, dataset, max_steps=4).train()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(tmp_path / "parts", tiny_vit(new_head=True), dataset, **settings)
    trainer.add_callback(InterruptAt(3))
    with pytest.raises(Interrupted):
        trainer.train()
    trainer = trainer_of(tmp_path / "parts", tiny_vit(seed=1, new_head=True), dataset, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert_same_tensors(copy_state(trainer.model), copy_state(whole))


def test_the_head_inside_adapters_is_fitted_and_its_original_is_not(tmp_path):
    from peft import LoraConfig

    args = SupervisedConfig(output_dir=str(tmp_path), max_steps=1, **QUIET)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    trainer = SupervisedTrainer(tiny_vit(new_head=True), args, train_dataset=NoiseImages(24), peft_config=lora)
    before = copy_state(trainer.model)
    trainer.prepare_start()
    names = moved(before, copy_state(trainer.model))
    assert len(names) == 2 and all("classifier.modules_to_save" in name for name in names)


def test_features_that_are_not_finite_are_refused(tmp_path):
    model = tiny_vit(new_head=True)
    model.vit.layernorm.weight.data[0] = torch.nan
    with pytest.raises(AdaLAError, match="not finite"):
        trainer_of(tmp_path, model).prepare_start()
