"""Stage 3 for segmentation: image and mask are cut alike, and what counts is the mask at its own resolution."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from training_helpers import (
    QUIET,
    InterruptAt,
    Interrupted,
    assert_same_tensors,
    copy_state,
    save_teacher,
)
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, TrainerCallback, ViTModel

from modeling_adala import DataError, UsageError, convert
from modeling_adala.conversion.loading import load_segmenter
from modeling_adala.inspection.towers import forward_features
from trainers import DataConfig, MeanIoU, SupervisedConfig, SupervisedTrainer
from trainers.data.image_dataset import BrokenImagesError, RowError, collate_images
from trainers.data.image_files import Unreadable
from trainers.data.segmentation_data import SegmentationData, SegmentationDataset, read_labels, read_mask
from trainers.data.transforms import SegmentationTransform, parse_size
from trainers.evaluation.segmentation import evaluate_segmentation, score_masks, segment
from trainers.runs.callbacks import read_metrics
from trainers.runs.stages import STAGES, run_stage
from vit_adala.cli import main

SIZE = (42, 56)
CLASSES = ["dark", "bright", "brightest"]


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def stripes(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A mask of three classes; its right edge is void."""
    rows, columns = np.mgrid[:height, :width]
    mask = ((columns + 16 * index) // (height // 2) % 2 + (rows > height // 2)).astype(np.uint8)
    mask[:, -3:] = 255
    return mask


def picture(mask: np.ndarray, seed: int = 0) -> np.ndarray:
    """A gray image in which the brightness tells the class."""
    noise = np.random.default_rng(seed).integers(0, 20, mask.shape)
    return (np.where(mask == 255, 0, mask) * 100 + noise).astype(np.uint8)


def rows(count: int, sizes: tuple[tuple[int, int], ...] = ((48, 64),)) -> list[dict[str, bytes]]:
    masks = [stripes(index, *sizes[index % len(sizes)]) for index in range(count)]
    return [{"image": png(picture(mask, index)), "label": png(mask)} for index, mask in enumerate(masks)]


def as_dataset(content: list[dict[str, bytes]]) -> datasets.Dataset:
    wrapped = [{name: {"bytes": value, "path": None} for name, value in row.items()} for row in content]
    features = datasets.Features(image=datasets.Image(), label=datasets.Image())
    return datasets.Dataset.from_list(wrapped, features=features)


def transform(train: bool = False, **options) -> SegmentationTransform:
    return SegmentationTransform(SIZE, 0.0, 1.0, num_channels=1, train=train, **options)


def masked(
    content: list[dict[str, bytes]], train: bool = False, num_labels: int = 3, **options
) -> SegmentationDataset:
    return SegmentationDataset(as_dataset(content), transform(train), num_labels=num_labels, **options)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A softmax teacher, its linear student, and datasets in parquet as the Hub has them."""
    root = tmp_path_factory.mktemp("segmentation")
    teacher = save_teacher(root / "teacher", head=False)
    student = convert(teacher, check_parity=False)
    student.config.adala_stage = "feature-alignment"
    student.save_pretrained(root / "student")
    for name, train, validation in (
        ("data", rows(12), rows(5, ((48, 64), (60, 64)))),
        ("stray-label", [*rows(3), {"image": png(picture(stripes(0))), "label": png(stripes(0) + 4)}], rows(1)),
    ):
        (root / name).mkdir()
        as_dataset(train).to_parquet(root / name / "train-00000-of-00001.parquet")
        as_dataset(validation).to_parquet(root / name / "validation-00000-of-00001.parquet")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def data(places) -> SegmentationData:
    config = DataConfig(dataset=places["data"], image_size="42x56")
    return SegmentationData(config, load_segmenter(places["student"], CLASSES).config, labels=CLASSES)


# --- images and masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("224", 224), (224, 224), ("336x448", (336, 448)), ("336X448", (336, 448))]
)
def test_sizes_of_the_command_line(text, size):
    assert parse_size("image_size", text) == size


@pytest.mark.parametrize("text", ["", "abc", "336x", "1x2x3", "-14", "22.4", True])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match=re.escape(f"image_size={text!r}") + ".*336x448"):
        parse_size("image_size", text)


def test_training_cuts_image_and_mask_alike():
    cut = transform(train=True, resample=0)
    mask = np.random.default_rng(0).integers(0, 200, (60, 90)).astype(np.uint8)
    seen = set()
    for seed in range(30):
        pixels, labels = cut(Image.fromarray(mask), mask, np.random.default_rng(seed))
        assert pixels.shape == (1, *SIZE) and labels.shape == SIZE and labels.dtype == torch.int64
        assert torch.equal((pixels[0] * 255).round().long(), labels)
        seen.add(labels.numpy().tobytes())
    assert len(seen) == 30


def test_training_flips_half_of_the_time():
    cut, mask = transform(train=True, crop_scale=(1, 1), crop_ratio=(1, 1)), np.tile(np.arange(56), (42, 1))
    image = Image.fromarray(mask.astype(np.uint8))
    first = [int(cut(image, mask, np.random.default_rng(seed))[1][0, 0]) for seed in range(100)]
    assert set(first) == {0, 55} and 30 < first.count(55) < 70


def test_evaluation_sees_the_whole_image_and_leaves_the_mask_as_it_is():
    mask = stripes(0, 30, 90)
    pixels, labels = transform()(
        Image.fromarray(np.where(np.arange(90) < 45, 0, 255)[None].repeat(30, 0).astype("u1")), mask
    )
    assert pixels.shape == (1, *SIZE)
    assert pixels[0, :, :26].max() < 0.1 and pixels[0, :, 30:].min() > 0.9
    assert np.array_equal(labels.numpy(), mask)


@pytest.mark.parametrize(
    "value",
    [
        png(stripes(0)),
        {"bytes": png(stripes(0).astype(np.uint16)), "path": None},
        Image.fromarray(stripes(0)),
        stripes(0).tolist(),
        stripes(0).astype(np.uint16),
    ],
    ids=["gray", "16 bits", "image", "list", "array"],
)
def test_masks_of_every_kind_are_read_alike(value):
    assert np.array_equal(read_mask(value, "row 0", 3), stripes(0))


def test_palette_masks_are_their_indices():
    image = Image.fromarray(stripes(0))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    assert image.mode == "P"
    assert np.array_equal(read_mask(image, "row 0", 3), stripes(0))


def test_reduced_labels_count_from_the_second():
    mask = np.array([[0, 1], [150, 255]], dtype=np.uint8)
    assert read_mask(mask, "row 0", 150, reduce_labels=True).tolist() == [[255, 0], [149, 255]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, ["row 7", "empty"]),
        (np.array([[0, 3]]), ["row 7", "label 3", "0 to 2", "--labels"]),
        (np.array([[-1, 0]]), ["row 7", "label -1"]),
        (png(np.zeros((4, 4, 3), np.uint8)), ["row 7", "RGB", "gray PNG"]),
        (np.zeros((2, 2)), ["row 7", "float64", "integers"]),
        (np.zeros((2, 2, 1), int), ["row 7", "(2, 2, 1)"]),
    ],
)
def test_masks_that_are_none_name_the_row(value, words):
    with pytest.raises(RowError) as error:
        read_mask(value, "row 7", 3)
    assert all(word in str(error.value) for word in words)


def test_mask_that_does_not_decode_is_told_from_one_that_is_wrong():
    with pytest.raises(Unreadable, match="mask"):
        read_mask(png(stripes(0))[:60], "row 7", 3)


def test_broken_images_and_masks_are_skipped_and_counted(caplog):
    content = rows(6)
    content[1]["image"] = content[1]["image"][:100]
    content[4]["label"] = b"no png"
    dataset = masked(content, max_broken_fraction=0.5)
    assert torch.equal(dataset[1]["labels"], dataset[2]["labels"])
    assert len([dataset[index] for index in range(6)]) == 6
    assert dataset.broken_indices == [1, 4] and dataset.summary() == "6 images, 2 skipped as unreadable"
    assert "row 1" in caplog.text and "row 4: mask" in caplog.text
    with pytest.raises(BrokenImagesError, match="2 of 6"):
        list(map(masked(content, max_broken_fraction=0.2).__getitem__, range(6)))


@pytest.mark.parametrize("workers", [0, 1])
def test_mask_of_another_size_names_the_row_in_one_line(workers):
    content = rows(3)
    content[2]["label"] = png(stripes(0, 64, 48))
    loader = DataLoader(masked(content), batch_size=1, num_workers=workers, collate_fn=collate_images)
    with pytest.raises(DataError) as error:
        list(loader)
    message = str(error.value)
    assert "row 2" in message and "64x48" in message and "48x64" in message and "\n" not in message


def test_column_of_class_numbers_is_no_column_of_masks():
    dataset = as_dataset(rows(2)).remove_columns("label").add_column("label", [0, 1])
    with pytest.raises(UsageError, match="--task image-classification"):
        SegmentationDataset(dataset, transform(), num_labels=2)


def test_batches_hold_masks_of_one_size_as_a_tensor_and_of_several_as_a_list():
    same, mixed = (masked(rows(2, sizes)) for sizes in (((48, 64),), ((48, 64), (60, 64))))
    assert collate_images([same[0], same[1]])["labels"].shape == (2, 48, 64)
    assert [tuple(mask.shape) for mask in collate_images([mixed[0], mixed[1]])["labels"]] == [(48, 64), (60, 64)]


# --- classes ---------------------------------------------------------------------------------------------------------


def test_class_names_come_from_text_or_from_json(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(CLASSES))
    (tmp_path / "id2label.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    for text in ("dark, bright,brightest", str(tmp_path / "list.json"), str(tmp_path / "id2label.json")):
        assert read_labels(text) == CLASSES


@pytest.mark.parametrize("content", [None, "{", '{"1": "a"}', "[1, 2]", '["a", "a"]'])
def test_wrong_class_names_are_refused(tmp_path, content):
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match="labels="):
        read_labels(str(path))


def test_classes_are_counted_in_the_masks_where_nobody_names_them(places, data):
    config = DataConfig(dataset=places["data"], image_size="42x56")
    model_config = SimpleNamespace(image_size=28, patch_size=7, num_channels=1)
    assert SegmentationData(config, model_config).labels == ["0", "1", "2"]
    assert data.labels == CLASSES


def test_labels_without_a_class_are_found_before_training(places):
    config = DataConfig(dataset=places["stray-label"], image_size="42x56")
    model_config = SimpleNamespace(image_size=28, patch_size=7, num_channels=1)
    with pytest.raises(DataError, match=r"row 3 holds label \d, but the classes are 0 to 2"):
        SegmentationData(config, model_config, labels=CLASSES)


def test_training_crops_are_as_large_as_the_windows(places, data):
    config = DataConfig(dataset=places["data"], image_size="42x56")
    model_config = SimpleNamespace(image_size=28, patch_size=7, num_channels=1)
    windowed = SegmentationData(config, model_config, labels=CLASSES, window=(21, 14))
    example = windowed.train_dataset(0)[0]
    assert example["pixel_values"].shape == (1, 21, 14) and example["labels"].shape == (21, 14)
    assert windowed.eval_dataset()[0]["pixel_values"].shape == (1, 42, 56)
    assert windowed.train_transform.crop_scale == (0.5 / 8, 1 / 8)
    with pytest.raises(UsageError, match="window=49x56 is larger than image_size=42x56"):
        SegmentationData(config, model_config, labels=CLASSES, window=(49, 56))


# --- scores ----------------------------------------------------------------------------------------------------------


class PixelModel(torch.nn.Module):
    """Scores each pixel by itself, so that windows cannot change the result. Counts its calls."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, pixel_values):
        self.sizes.append(tuple(pixel_values.shape[-2:]))
        return SimpleNamespace(logits=torch.cat([pixel_values, pixel_values.square()], dim=1))


@pytest.mark.parametrize(
    ("windows", "calls"),
    [
        (((4, 4), (2, 2)), 12),
        (((4, 4), (3, 3)), 6),
        (((7, 9), (1, 1)), 1),
        (((7, 2), (7, 2)), 5),
        (((5, 9), (4, 4)), 2),
    ],
)
def test_windows_cover_every_pixel_once_on_average(windows, calls):
    model, pixels = PixelModel(), torch.randn(2, 1, 7, 9)
    whole = segment(model, pixels)
    torch.testing.assert_close(segment(model, pixels, windows), whole, rtol=0, atol=1e-6)
    assert model.sizes[1:] == [windows[0]] * calls


def test_windows_are_averaged_where_they_overlap():
    class Constant(torch.nn.Module):
        calls = 0

        def forward(self, pixel_values):
            self.calls += 1
            return SimpleNamespace(logits=torch.full((1, 1, 1, 1), float(self.calls)))

    scores = segment(Constant(), torch.zeros(1, 1, 2, 6), ((2, 4), (2, 2)))
    assert scores[0, 0].tolist() == [[1, 1, 1.5, 1.5, 2, 2]] * 2


def test_scores_are_those_of_mean_iou_at_the_size_of_each_mask():
    logits = torch.randn(3, 4, 6, 8)
    masks = [torch.randint(4, size) for size in ((12, 16), (9, 31), (6, 8))]
    masks[0][:5] = 255
    losses, maps = score_masks(logits, masks)
    for scores, mask, loss, found in zip(logits, masks, losses, maps, strict=True):
        scores = torch.nn.functional.interpolate(scores[None], mask.shape, mode="bilinear")
        torch.testing.assert_close(torch.nn.functional.cross_entropy(scores, mask[None], ignore_index=255), loss)
        assert torch.equal(scores.argmax(1)[0], found)
    assert MeanIoU(4).sums(maps, masks).sum() == sum((mask != 255).sum() for mask in masks)


def test_image_of_void_has_no_loss_and_no_pixels():
    void = torch.full((1, 4, 4), 255)
    losses, maps = score_masks(torch.randn(1, 3, 2, 2), void)
    assert losses.tolist() == [0] and MeanIoU(3).sums(maps, void).sum() == 0


@pytest.fixture(scope="module")
def segmenter(places):
    return load_segmenter(places["student"], CLASSES)


def batches(data: SegmentationData, size: int) -> DataLoader:
    return data.loader(data.eval_dataset(), size)


def test_split_is_scored_as_a_whole_whatever_the_batches(data, segmenter):
    small, large = (evaluate_segmentation(segmenter, batches(data, size)) for size in (1, 5))
    assert small == pytest.approx(large, abs=1e-6)
    assert set(small) == {"loss", "mean_iou", "mean_accuracy", "pixel_accuracy", *(f"iou_{name}" for name in CLASSES)}
    assert small["mean_iou"] == pytest.approx(np.mean([small[f"iou_{name}"] for name in CLASSES]))


def test_no_images_to_score_are_refused(segmenter):
    with pytest.raises(DataError, match="--eval-split"):
        evaluate_segmentation(segmenter, [])


# --- training --------------------------------------------------------------------------------------------------------


def settings(directory: Path, **changes) -> SupervisedConfig:
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
    return SupervisedConfig(output_dir=str(directory), **QUIET | options | {"logging_steps": 1} | changes)


@pytest.mark.parametrize("window", [None, "28x21"])
def test_trainer_reports_what_evaluate_segmentation_finds(tmp_path, data, segmenter, window):
    args = settings(tmp_path, window=window)
    trainer = SupervisedTrainer(segmenter, args, eval_dataset=data.eval_dataset())
    expected = evaluate_segmentation(segmenter, batches(data, 1), windows=args.windows)
    for _ in range(2):  # the second evaluation starts from nothing
        metrics = trainer.evaluate()
        for name in ("mean_iou", "pixel_accuracy", "iou_bright"):
            assert metrics[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-6)


def test_training_lowers_the_loss_and_finds_the_classes(tmp_path, places, data):
    class Losses(TrainerCallback):
        values: list[float] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.values += [logs["loss"]] if "loss" in logs else []

    model = load_segmenter(places["student"], CLASSES)
    before, losses = evaluate_segmentation(model, batches(data, 5))["mean_iou"], Losses()
    args = settings(tmp_path, max_steps=30, learning_rate=3e-3, save_strategy="no", head_fit_images=0)
    SupervisedTrainer(model, args, train_dataset=data.train_dataset(0), callbacks=[losses]).train()
    assert np.mean(losses.values[-5:]) < 0.7 * np.mean(losses.values[:5])
    assert evaluate_segmentation(model, batches(data, 5))["mean_iou"] > max(0.5, before + 0.1)


def test_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, places, data):
    def run(name: str, *callbacks: TrainerCallback):
        torch.manual_seed(0)
        model, directory = load_segmenter(places["student"], CLASSES), tmp_path / name / "3-supervised"
        kwargs = {"train_dataset": data.train_dataset(0), "eval_dataset": data.eval_dataset()}
        args = settings(directory, eval_strategy="steps", eval_steps=2)
        return run_stage(STAGES["supervised"], model, args, callbacks=list(callbacks), **kwargs)

    expected = run("whole")
    with pytest.raises(Interrupted):
        run("killed", InterruptAt(3))
    resumed = run("killed")
    assert resumed.resumed_from_step == 2
    assert_same_tensors(copy_state(resumed.model), copy_state(expected.model))
    lines = [read_metrics(tmp_path / name / "3-supervised" / "metrics.jsonl") for name in ("whole", "killed")]
    scores = [[line["eval_mean_iou"] for line in part if "eval_mean_iou" in line] for part in lines]
    assert scores[0] == scores[1] and len(scores[0]) == 2


def test_softmax_teacher_is_opened_as_its_equal(places, caplog):
    caplog.set_level("INFO")
    baseline = load_segmenter(places["teacher"], CLASSES)
    assert "softmax_layers = all 2 layers" in caplog.text
    assert baseline.config.softmax_layers == [0, 1] and type(baseline) is type(
        load_segmenter(places["student"], CLASSES)
    )
    pixels = torch.randn(2, 1, *SIZE)
    stock = ViTModel.from_pretrained(places["teacher"])
    torch.testing.assert_close(forward_features(baseline, pixels), forward_features(stock, pixels), atol=1e-5, rtol=0)


def test_head_is_kept_for_its_own_classes_and_new_for_others(tmp_path, segmenter):
    segmenter.save_pretrained(tmp_path)
    again, other = load_segmenter(str(tmp_path), CLASSES), load_segmenter(str(tmp_path), ["a", "b"])
    assert_same_tensors(copy_state(again), copy_state(segmenter))
    assert other.config.num_labels == 2 and other.config.id2label == {0: "a", 1: "b"}


# --- command ---------------------------------------------------------------------------------------------------------


def arguments(places: dict[str, str], out: Path, **changes) -> list[str]:
    options = {"model": places["student"], "task": "semantic-segmentation", "dataset": places["data"]}
    options |= {"image-size": "42x56", "output-dir": out, "max-steps": 2, "per-device-train-batch-size": 4}
    options |= {"bf16": "false", "use-cpu": "true", "disable-tqdm": "true"} | changes
    model = options.pop("model")
    return ["finetune", model, *(part for name, value in options.items() for part in ("--" + name, str(value)))]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("student", {"labels": "dark,bright,brightest"}),
        ("teacher", {}),
        ("student", {"window": "28", "stride": "14x28"}),
    ],
)
def test_command_trains_scores_and_leaves_a_model(places, tmp_path, capsys, model, changes):
    out = tmp_path / "3-supervised"
    assert main(arguments(places, out, model=places[model], **{"eval-split": "validation"}, **changes)) == 0
    printed = capsys.readouterr().out
    names = CLASSES if "labels" in changes else ["0", "1", "2"]
    assert all(re.search(rf"│ {name} +│ \d\.\d{{4}} │", printed) for name in [*names, "mean IoU", "pixel accuracy"])
    score = read_metrics(out / "metrics.jsonl")[-1]
    assert score["stage"] == "supervised"
    assert f"mean IoU {score['eval_mean_iou']:.4f} on 5 images" in printed
    assert {f"eval_iou_{name}" for name in names} <= set(score)
    saved = AutoModelForSemanticSegmentation.from_pretrained(out)
    assert saved.config.adala_stage == "supervised" and list(saved.config.id2label.values()) == names
    assert saved.config.softmax_layers == ([0, 1] if model == "teacher" else [])
    processor = AutoImageProcessor.from_pretrained(out)  # made for segmenters, unlike the family's own
    assert (processor.size["height"], processor.size["width"]) == (42, 56)
    scores = saved(torch.zeros(1, 1, 42, 56))
    assert processor.post_process_semantic_segmentation(scores, [(48, 64)])[0].shape == (48, 64)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"image-size": "42x50"}, 2, ["image_size=(42, 50)", "width 50", "49 or 56"]),
        ({"image-size": "42by56"}, 2, ["image_size='42by56'", "336x448"]),
        ({"label-column": "mask"}, 2, ["label_column='mask'", "image, label"]),
        ({"labels": "a,b"}, 1, ["label 2", "0 to 1", "--labels"]),
        ({"labels": "a,,b"}, 2, ["labels='a,,b'", "sky,road,car"]),
        ({"labels": "no.json"}, 2, ["labels='no.json'", "could not be read"]),
        ({"window": "30"}, 2, ["30", "28 or 35"]),
        ({"window": "49x56"}, 2, ["window=49x56", "42x56"]),
        ({"stride": "7"}, 2, ["stride='7'", "window"]),
        ({"window": "28", "stride": "35"}, 2, ["stride='35'", "28x28"]),
        ({"eval-split": "test"}, 2, ["split='test'", "train, validation"]),
        ({"task": "image-classification"}, 2, ["label_column='label'", "not class numbers"]),
        ({"task": "image-classification", "labels": "a,b"}, 2, ["labels='a,b'", "--task semantic-segmentation"]),
        ({"task": "depth"}, 2, ["task='depth'", "image-classification, semantic-segmentation"]),
    ],
)
def test_mistake_is_refused_in_one_line_before_training(places, tmp_path, capsys, changes, code, words):
    out = tmp_path / "out"
    assert main(arguments(places, out, **changes)) == code
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and not out.exists()
    assert all(word in captured.err for word in words), captured.err


def test_class_names_are_shown_as_they_are(places, tmp_path, capsys):
    """Neither rich's markup nor a terminal's own: a dataset of others may name its classes as it likes."""
    names = ["[/x]", "[link=file:///etc/passwd]b[/link]", "c\x1b]8;;http://x\x07"]
    (tmp_path / "labels.json").write_text(json.dumps(names))
    out = tmp_path / "out"
    assert main(arguments(places, out, labels=tmp_path / "labels.json")) == 0
    printed = capsys.readouterr().out
    assert names[0] in printed and names[1] in printed and "\x1b" not in printed and "\x07" not in printed
    assert list(AutoModelForSemanticSegmentation.from_pretrained(out).config.id2label.values()) == names


@pytest.mark.parametrize("labels", [None, CLASSES])
def test_16_bit_masks_of_no_class_numbers_are_refused_before_training(tmp_path, labels):
    mask = stripes(0).astype(np.uint16)
    mask[0, 0] = 3000
    for train, validation in (([mask], [stripes(0)]), ([stripes(0)], [mask])):
        splits = {"train": train, "validation": validation}
        content = {
            name: as_dataset([{"image": png(picture(stripes(0))), "label": png(one)} for one in masks])
            for name, masks in splits.items()
        }
        config = DataConfig(dataset=datasets.DatasetDict(content), image_size="42x56")
        with pytest.raises(DataError, match=r"row 0 holds label 3000, but the classes are 0 to (254|2) and 255"):
            SegmentationData(config, SimpleNamespace(image_size=28, patch_size=7, num_channels=1), labels=labels)


def test_more_classes_than_masks_can_hold_are_refused(places):
    config = DataConfig(dataset=places["data"], image_size="42x56")
    with pytest.raises(UsageError, match="256 classes"):
        SegmentationData(
            config,
            SimpleNamespace(image_size=28, patch_size=7, num_channels=1),
            labels=[str(number) for number in range(256)],
        )


def test_split_without_masks_is_passed_over(places, caplog):
    features = datasets.Features(image=datasets.Image(), label=datasets.Image())
    unlabeled = datasets.Dataset.from_dict(
        {"image": [{"bytes": row["image"], "path": None} for row in rows(2)], "label": [None, None]}, features=features
    )
    content = {"train": as_dataset(rows(3)), "test": unlabeled, "validation": as_dataset(rows(2))}
    model = SimpleNamespace(image_size=28, patch_size=7, num_channels=1)
    config = DataConfig(dataset=datasets.DatasetDict(content), image_size="42x56")
    assert SegmentationData(config, model).num_eval_images == 2 and "evaluating on 'validation'" in caplog.text
    del content["validation"]
    config = DataConfig(dataset=datasets.DatasetDict(content), image_size="42x56")
    assert SegmentationData(config, model).raw_eval is None


def test_classifier_is_fine_tuned_at_a_size_that_is_not_its_own(places, tmp_path, capsys):
    argv = ["finetune", places["teacher"], "--dataset", "mnist-digits", "--train-split", "train[:8]"]
    argv += ["--eval-split", "test[:8]", "--image-size", "35x28", "--max-steps", "1", "--bf16", "false"]
    assert main([*argv, "--use-cpu", "true", "--output-dir", str(tmp_path / "out")]) == 0
    assert "accuracy" in capsys.readouterr().out
