"""The frozen segmentation probe: it reads what patch features hold, and nothing that they do not."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import tiny_dinov2

from modeling_adala import AdaLAError, DataError, convert
from trainers.data.data_config import DataConfig
from trainers.data.segmentation_data import SegmentationData
from trainers.evaluation.dense_probe import (
    DenseProbe,
    PatchBank,
    class_shares,
    extract_patches,
    fit_probe,
    score_probe,
)
from vit_adala.cli import main

NAMES = ["left", "right", "sky"]


def bank(images: int, seed: int, informative: bool = True) -> PatchBank:
    """Features `(8, 4, 6)` that tell the class of each patch, or noise; masks of 8 x 12 pixels with a void border."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 3, (images, 4, 6), generator=generator)
    features = torch.randn(images, 8, 4, 6, generator=generator)
    if informative:
        features[:, :3] += 8 * torch.nn.functional.one_hot(classes, 3).permute(0, 3, 1, 2)
    masks = [mask.repeat_interleave(2, 0).repeat_interleave(2, 1) for mask in classes]
    for mask in masks:
        mask[0] = 255
    return PatchBank(features, masks)


def figures(train: PatchBank, test: PatchBank) -> dict[str, float]:
    return score_probe(fit_probe(train, len(NAMES)), test, NAMES)


def test_features_that_hold_the_classes_give_nearly_all_of_them_and_noise_gives_chance():
    good = figures(bank(32, 0), bank(16, 1))
    bad = figures(bank(32, 0, informative=False), bank(16, 1, informative=False))
    assert good["mean_iou"] > 0.75 > 0.4 > bad["mean_iou"] > 0.1
    assert {f"iou_{name}" for name in NAMES} <= good.keys()
    assert figures(bank(32, 0), bank(16, 1)) == good  # the same seed, the same figures


def test_shares_are_those_of_the_pixels_that_count():
    masks = [torch.tensor([[0, 0, 1, 255], [0, 2, 255, 255]])]
    shares = class_shares(masks, 3, (1, 2))
    assert shares[0, :, 0, 0].tolist() == [0.75, 0, 0.25]
    assert shares[0, :, 0, 1].tolist() == [0, 0.25, 0]


def test_patches_are_those_of_the_model_in_the_order_of_the_image():
    model = tiny_dinov2().train()
    pixels = torch.randn(2, model.config.num_channels, 28, 42)
    found = extract_patches(model, [{"pixel_values": pixels, "labels": [torch.zeros(5, 7)] * 2}])
    assert found.features.shape == (2, model.config.hidden_size, 4, 6) and len(found) == 2
    model.eval()
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(found.features[1, :, 1, 0], tokens[1, 6])
    with pytest.raises(DataError, match="0 images to probe on"):
        extract_patches(model, [])
    model.layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(AdaLAError, match="features are not finite"):
        extract_patches(model, [{"pixel_values": pixels, "labels": [torch.zeros(5, 7)] * 2}])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A teacher, its student, and pictures whose left and right halves differ, with masks."""
    root = tmp_path_factory.mktemp("dense")
    teacher = tiny_dinov2()
    teacher.save_pretrained(root / "teacher")
    convert(str(root / "teacher"), check_parity=False).save_pretrained(root / "student")
    rng, rows = np.random.default_rng(0), {"image": [], "label": []}
    for _ in range(12):
        pixels = rng.integers(0, 90, (28, 56, 3), dtype=np.uint8)
        pixels[:, 28:] += 150
        mask = np.zeros((28, 56), dtype=np.uint8)
        mask[:, 28:] = 1
        rows["image"].append(Image.fromarray(pixels))
        rows["label"].append(Image.fromarray(mask))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(root / "data"))
    return root


def test_a_pair_is_probed_on_the_same_images(places):
    teacher = tiny_dinov2()
    config = DataConfig(dataset=str(places / "data"), image_size="28x56")
    data = SegmentationData(config, teacher.config, labels=["left", "right"])
    results = DenseProbe(teacher, data, disable_progress=True)(teacher)
    assert results["student_mean_iou"] == results["teacher_mean_iou"] > 0.9
    assert results["mean_iou_retained"] == results["pixel_accuracy_retained"] == 1


def test_the_command_probes_masks(places, capsys):
    arguments = ["evaluate", str(places / "student"), "--teacher", str(places / "teacher"), "--dataset"]
    arguments += [str(places / "data"), "--image-size", "28x56", "--task", "semantic-segmentation", "--json"]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert 0 < results["student_mean_iou"] <= 1 and results["teacher_mean_iou"] > 0.9
    assert results["mean_iou_retained"] == pytest.approx(results["student_mean_iou"] / results["teacher_mean_iou"])
    assert main([*arguments, "--task", "detection"]) == 2
    assert "task='detection' is not supported" in capsys.readouterr().err


def test_a_recipe_on_data_with_masks_probes_them_and_shows_what_softmax_layers_gain_and_cost(places, tmp_path):
    arguments = [
        "run",
        "--teacher",
        str(places / "teacher"),
        "--dataset",
        str(places / "data"),
        "--image-size",
        "28x56",
    ]
    arguments += ["--output-dir", str(tmp_path / "out"), "--softmax-layers", "auto:1", "--local-mixing", "3"]
    for stage in ("attention_alignment", "feature_alignment"):
        arguments += ["--set", f"{stage}.max_steps=1", "--set", f"{stage}.bf16=false"]
    assert main(arguments) == 0
    evaluations = json.loads((tmp_path / "out" / "manifest.json").read_text())["evaluations"]
    assert "student_mean_iou" not in evaluations["attention-alignment"]  # the last row is the result
    assert 0 < evaluations["feature-alignment"]["student_mean_iou"] <= 1
    assert evaluations["feature-alignment"]["teacher_mean_iou"] > 0.9
    report = (tmp_path / "out" / "report.md").read_text()
    assert "probe mIoU" in report and "- Recipe: default; feature map" in report and "local mixing 3x3: " in report
    assert "chosen by measurement after stage 1" in report
    trade = json.loads((tmp_path / "out" / "speed.json").read_text())["softmax_layers"]
    assert [len(row["layers"]) for row in trade] == [0, 1, 2]
    assert trade[2]["relative_error"] < 1e-3  # both of two layers: the teacher itself
    assert all(row["seconds"] > 0 for row in trade)
    for row in trade:
        assert f"| {row['relative_error']:.3f} | {1000 * row['seconds']:.1f} |" in report
