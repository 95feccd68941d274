"""Streams train: in a mixed order, over and over, and to the same weights after a kill."""

import io
import itertools
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

from modeling_adala import DataError, UsageError, convert
from modeling_adala.conversion.loading import load_classifier
from trainers import DataConfig, DataModule, RecipeConfig, StreamingImageDataset, load_images
from trainers.data.image_dataset import BrokenImagesError, collate_images
from trainers.data.transforms import ImageTransform
from trainers.runs.stages import STAGES, run_stage
from vit_adala.cli import main

CLASSES, OF_EACH = 4, 40
MODEL = SimpleNamespace(image_size=28, patch_size=7, num_channels=1)


def png(label: int, number: int) -> bytes:
    pixels = np.random.default_rng(1000 * label + number).integers(0, 60, (28, 28)) + 60 * label
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """The same images, sorted by class, as a folder and as parquet; a teacher and its student."""
    root = tmp_path_factory.mktemp("streams")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        # `datasets` waits 5 s whenever a parquet stream is closed, for threads that are long done here
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=CLASSES))
        rows = [(label, number) for label in range(CLASSES) for number in range(OF_EACH)]
        images = [{"bytes": png(*row), "path": None} for row in rows]
        for split, part in (("train", rows), ("test", rows[:: OF_EACH // 2])):
            for label, number in part:
                path = root / "folder" / split / f"class-{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(label, number))
        table = datasets.Dataset.from_dict({"image": images, "label": [label for label, _ in rows]}, features=features)
        (root / "parquet").mkdir()
        table.to_parquet(root / "parquet" / "train-00000-of-00001.parquet", batch_size=10)
        numbered = table.cast_column("label", datasets.Value("int64"))
        (root / "numbered").mkdir()
        numbered.to_parquet(root / "numbered" / "train-00000-of-00001.parquet", batch_size=10)
        teacher = save_teacher(root / "teacher")
        student = convert(teacher, check_parity=False)
        student.config.adala_stage = "feature-alignment"
        student.save_pretrained(root / "student")
        yield {path.name: str(path) for path in root.iterdir()}


def stream_of(source: str, **settings) -> StreamingImageDataset:
    return DataModule(
        DataConfig(dataset=source, streaming=True, **settings), MODEL, require_labels=True
    ).train_dataset(0)


def first(stream, count: int) -> list[dict]:
    return list(itertools.islice(iter(stream), count))


def hashes(examples: list[dict]) -> list[bytes]:
    return [example["pixel_values"].numpy().tobytes() for example in examples]


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_first_examples_of_data_sorted_by_class_are_mixed(places, source):
    plain = load_images(places[source], streaming=source == "parquet")
    assert {row["label"] for row in itertools.islice(plain, 40)} == {0}  # sorted indeed
    counts = np.bincount([example["labels"] for example in first(stream_of(places[source]), 100)], minlength=CLASSES)
    assert counts.min() > 10, counts


def test_folder_is_mixed_though_the_buffer_is_small(places):
    """It is read by a table of its paths, which are shuffled as a whole."""
    stream = stream_of(places["folder"], shuffle_buffer=2)
    counts = np.bincount([example["labels"] for example in first(stream, 100)], minlength=CLASSES)
    assert counts.min() > 10, counts
    assert stream.dataset.num_shards > 8  # so that workers can share it


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_every_pass_gives_every_image_once_in_an_order_of_its_own(places, source, workers):
    stream, size = stream_of(places[source], crop_scale=1, horizontal_flip=0), CLASSES * OF_EACH
    loader = DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=collate_images)
    seen = hashes(list(itertools.islice(loader, 3 * size)))
    if workers:  # which come to the end of their parts at different times
        assert all(2 <= seen.count(image) <= 4 for image in set(seen)) and len(set(seen)) == size
        return
    passes = [seen[start : start + size] for start in (0, size, 2 * size)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes) and len(set(passes[0])) == size
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert hashes(first(stream, size)) == passes[0]  # again from the start


def test_every_pass_draws_crops_of_its_own(places):
    stream = stream_of(places["folder"], shuffle_buffer=1)
    size = CLASSES * OF_EACH
    seen = hashes(first(stream, 2 * size))
    assert len(set(seen[:size]) & set(seen[size:])) < size // 10


def test_other_seeds_give_other_orders(places):
    data = DataModule(DataConfig(dataset=places["parquet"], streaming=True), MODEL)
    assert hashes(first(data.train_dataset(0), 9)) == hashes(first(data.train_dataset(0), 9))
    labels = [[e["pixel_values"].mean().item() for e in first(data.train_dataset(seed), 20)] for seed in (0, 1)]
    assert labels[0] != labels[1]


def test_repeated_stream_without_a_readable_image_ends(tmp_path):
    files = [{"bytes": b"no image", "path": None}] * 3
    features = datasets.Features(image=datasets.Image())
    raw = load_images(datasets.Dataset.from_dict({"image": files}, features=features), streaming=True)
    options = {"transform": ImageTransform(28, 0.0, 1.0), "repeat": True}
    with pytest.raises(BrokenImagesError, match="Pillow does not know its format"):
        next(iter(StreamingImageDataset(raw, max_broken_fraction=0.0, **options)))
    assert list(StreamingImageDataset(raw, max_broken_fraction=1.0, **options)) == []


# --- training --------------------------------------------------------------------------------------------------------


def command(
    name: str, places: dict[str, str], out: Path | str, *more: str, source: str = "folder", steps: int = 3
) -> int:
    model, *more = more  # what the command works on comes first
    argv = [name, model, "--dataset", places[source], "--streaming", "true", "--output-dir", str(out)]
    argv += ["--max-steps", str(steps), "--per-device-train-batch-size", "4", "--bf16", "false", "--use-cpu", "true"]
    return main([*argv, "--disable-tqdm", "true", *more])


@pytest.mark.parametrize(("source", "workers"), [("folder", 0), ("parquet", 2)])
def test_all_three_stages_train_on_a_stream(places, tmp_path, capsys, source, workers):
    more = ("--dataloader-num-workers", str(workers))
    teacher, one, two, three = (places["teacher"], *(str(tmp_path / stage.directory) for stage in STAGES.values()))
    calibrated = ("--calibration-images", "8", *more)
    assert command("align", places, one, teacher, *calibrated, source=source) == 0
    assert command("distill", places, two, one, "--teacher", teacher, *calibrated, source=source) == 0
    assert command("finetune", places, three, two, *more, source=source) == 0
    printed = capsys.readouterr().out
    assert printed.count("3 steps") == 3
    assert ("accuracy" in printed) == (source == "folder")  # the other has no split to evaluate on


@pytest.mark.parametrize("name", ["align", "distill", "finetune"])
def test_stream_without_max_steps_is_refused_before_anything_is_opened(tmp_path, capsys, name):
    nowhere = {"teacher": "no-teacher", "folder": "no-data"}
    assert command(name, nowhere, tmp_path / "out", "no-model", steps=-1) == 2
    captured = capsys.readouterr()
    assert "max_steps=-1" in captured.err and "streaming" in captured.err and len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_recipe_with_a_stream_and_epochs_is_refused():
    with pytest.raises(UsageError, match="max_steps=-1"):
        RecipeConfig(teacher="t", dataset="d", streaming=True, feature_alignment={"max_steps": -1})


def test_stream_of_numbers_without_names_is_refused_for_labels(places, tmp_path, capsys):
    assert command("finetune", places, tmp_path / "out", places["student"], source="numbered") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "label_column='label'" in line and "streaming" in line and not (tmp_path / "out").exists()


def run(stage: str, places: dict[str, str], out: Path, *callbacks, workers: int = 0):
    torch.manual_seed(0)
    config = DataConfig(dataset=places["parquet" if workers else "folder"], streaming=True)
    settings = {"max_steps": 8, "save_steps": 2, "per_device_train_batch_size": 32, "logging_steps": 1}
    settings |= {"dataloader_num_workers": workers, **QUIET}
    if stage == "supervised":
        data = DataModule(config, MODEL, require_labels=True)
        model, kwargs = load_classifier(places["student"], data.labels), {}
    else:
        data = DataModule(config, MODEL)
        model, kwargs = convert(places["teacher"], check_parity=False), {"teacher_model": places["teacher"]}
        settings["calibration_images"] = 8
    args = STAGES[stage].config_class(output_dir=str(out / STAGES[stage].directory), **settings)
    kwargs |= {"train_dataset": data.train_dataset(0), "callbacks": list(callbacks)}
    return run_stage(STAGES[stage], model, args, **kwargs)


@pytest.mark.parametrize(
    ("stage", "workers"),
    # in `make test` the stage that has both teacher and workers
    [pytest.param(s, n, marks=[] if n else pytest.mark.long) for s, n in zip(STAGES, (0, 2, 0), strict=True)],
)
def test_killed_run_on_a_stream_ends_with_the_weights_of_an_uninterrupted_one(places, tmp_path, stage, workers):
    """Killed in the first pass, and resumed into the second: 8 steps of 32 are more than the 160 images."""
    expected = run(stage, places, tmp_path / "whole", workers=workers)
    with pytest.raises(Interrupted):
        run(stage, places, tmp_path / "killed", InterruptAt(5), workers=workers)
    resumed = run(stage, places, tmp_path / "killed", workers=workers)
    assert resumed.resumed_from_step == 4
    assert_same_tensors(copy_state(resumed.model), copy_state(expected.model))


def test_summary_counts_what_was_seen(places):
    stream = stream_of(places["folder"])
    first(stream, 2 * CLASSES * OF_EACH)
    assert stream.summary() == "320 images, 0 skipped as unreadable"


def test_label_without_a_class_in_a_stream_is_an_error(places):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    for label, words in ((-1, "is -1 in row 0"), (7, "is 7 in row 0, which is not one of the 4 classes")):
        rows = {"image": [{"bytes": png(0, 0), "path": None}], "label": [label]}
        raw = load_images(datasets.Dataset.from_dict(rows, features=features), streaming=True)
        stream = StreamingImageDataset(raw, ImageTransform(28, 0, 1), label_column="label", label_ids=[0, 1, 2, 3])
        with pytest.raises(DataError, match=words):
            next(iter(stream))


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_splits(places, tmp_path) -> Path:
    """A folder of parquet files whose training split cannot be read past its first row group."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=CLASSES))
    rows = datasets.load_dataset("parquet", data_files=f"{places['parquet']}/*.parquet", split="train")
    rows = rows.cast(features)
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", batch_size=10)
    rows.select(range(0, 40, 4)).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    unlabeled = rows.select(range(6)).remove_columns("label").add_column("label", [-1] * 6).cast(features)
    unlabeled.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    return tmp_path / "data"


def test_evaluation_images_of_a_stream_are_read_and_no_others(two_splits, monkeypatch):
    read = []
    from_generator = datasets.Dataset.from_generator

    def counted(*args, gen_kwargs, **kwargs):
        read.append(str(gen_kwargs["stream"].split))
        return from_generator(*args, gen_kwargs=gen_kwargs, **kwargs)

    monkeypatch.setattr(datasets.Dataset, "from_generator", counted)
    data = DataModule(DataConfig(dataset=str(two_splits), streaming=True), MODEL, require_labels=True)
    assert len(data.raw_eval) == data.num_eval_images == 10 and read == ["validation"]
    assert data.eval_dataset()[3]["pixel_values"].shape == (1, 28, 28)
    cached = {path.name for path in Path(datasets.config.HF_DATASETS_CACHE).rglob("*train*.arrow")}
    sliced = DataModule(DataConfig(dataset=str(two_splits), streaming=True, eval_split="validation[2:5]"), MODEL)
    assert sliced.num_eval_images == 3 and data.labels == sliced.labels == [str(label) for label in range(CLASSES)]
    assert cached == {path.name for path in Path(datasets.config.HF_DATASETS_CACHE).rglob("*train*.arrow")}


def test_evaluation_images_that_changed_are_read_again(two_splits):
    config = DataConfig(dataset=str(two_splits), streaming=True, eval_split="validation")
    assert DataModule(config, MODEL).num_eval_images == 10
    path = two_splits / "validation-00000-of-00001.parquet"
    shorter = datasets.load_dataset("parquet", data_files=str(path), split="train").select(range(4))
    path.unlink()
    shorter.to_parquet(path)
    assert DataModule(config, MODEL).num_eval_images == 4
