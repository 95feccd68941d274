"""The teacher's features on disk: the same losses, never those of other images, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from training_helpers import QUIET, copy_state, moved, save_teacher, tiny_vit

from modeling_adala import CheckpointError, DataError, UsageError, convert
from trainers.data import feature_cache
from trainers.data.image_dataset import ImageDataset
from trainers.data.transforms import ImageTransform
from trainers.feature_alignment_config import FeatureAlignmentConfig
from trainers.feature_alignment_trainer import FeatureAlignmentTrainer
from vit_adala.cli import main

STATES, TOKENS, WIDTH = 2, 17, 32


def images(count: int = 12, seed: int = 0, **transform) -> ImageDataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    rows = datasets.Dataset.from_dict({"image": list(pixels)}, datasets.Features({"image": datasets.Image()}))
    return ImageDataset(rows, ImageTransform(28, 0.5, 0.5, num_channels=1, **transform))


def trainer_of(folder: Path, dataset: ImageDataset, *, teacher=None, **settings) -> FeatureAlignmentTrainer:
    teacher = teacher or tiny_vit()
    defaults = {"max_steps": 5, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}
    args = FeatureAlignmentConfig(
        output_dir=str(folder / "out"), **{**QUIET, **defaults, "hidden_states": [0], **settings}
    )
    student = convert(teacher, check_parity=False, feature_map="elu")
    return FeatureAlignmentTrainer(student, teacher, args, train_dataset=dataset)


def losses_of(trainer: FeatureAlignmentTrainer) -> list[dict[str, float]]:
    names = ("loss", "cls", "patches", "hidden_0")
    return [{name: line[name] for name in names} for line in trainer.state.log_history if "loss" in line]


def count_teacher_passes(trainer: FeatureAlignmentTrainer) -> list[int]:
    """Batch sizes of the teacher's passes, filled as they come."""
    sizes: list[int] = []
    trainer.teacher_model.vit.embeddings.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    return sizes


def folders(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_losses_and_weights_are_those_without_the_cache(tmp_path):
    trainers = [trainer_of(tmp_path, images(), teacher_feature_cache=cache) for cache in (None, str(tmp_path / "c"))]
    start = copy_state(trainers[0].model)
    for trainer in trainers:
        trainer.train()
    plain, cached = (losses_of(trainer) for trainer in trainers)
    assert len(plain) == 5  # two epochs, in orders of their own
    for expected, found in zip(plain, cached, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert moved(start, copy_state(trainers[1].model))
    for name, tensor in copy_state(trainers[0].model).items():
        torch.testing.assert_close(copy_state(trainers[1].model)[name], tensor, rtol=1e-4, atol=1e-6)


def test_teacher_runs_once_over_the_images_and_not_at_all_in_the_next_run(tmp_path):
    cache, sizes = str(tmp_path / "c"), []
    for _ in range(2):
        trainer = trainer_of(tmp_path, images(), teacher_feature_cache=cache, calibration_images=4)
        sizes.append(count_teacher_passes(trainer))
        trainer.train()
    assert sizes == [[4, 4, 4, 4], [4]]  # the calibration, and the 12 images once
    (folder,) = folders(tmp_path / "c")
    assert np.load(folder / "features.npy", mmap_mode="r").shape == (12, STATES, TOKENS, WIDTH)


def test_float16_takes_half_the_space_and_gives_nearly_the_same_losses(tmp_path):
    logged, sizes = [], []
    for dtype in ("float32", "float16"):
        cache = tmp_path / dtype
        trainer = trainer_of(tmp_path, images(), teacher_feature_cache=str(cache), teacher_feature_cache_dtype=dtype)
        trainer.train()
        logged.append(losses_of(trainer))
        sizes.append((folders(cache)[0] / "features.npy").stat().st_size - 128)  # NumPy's header
    assert sizes[0] == 2 * sizes[1] == 4 * 12 * STATES * TOKENS * WIDTH
    assert logged[0] != logged[1]
    for expected, found in zip(*logged, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": lambda: images(seed=1)},
        {"dataset": lambda: images(count=11)},
        {"dataset": lambda: images(resample=2)},
        {"teacher": lambda: tiny_vit(seed=1)},
        {"hidden_states": lambda: [1]},
        {"bf16": lambda: True},
        {"teacher_feature_cache_dtype": lambda: "float16"},
    ],
    ids=["images", "number of images", "transform", "teacher", "hidden states", "precision", "dtype"],
)
def test_whatever_differs_gets_a_cache_of_its_own(tmp_path, other):
    settings = {name: value() for name, value in other.items()}
    dataset = settings.pop("dataset", None) or images()
    for options in ({"dataset": images()}, {"dataset": dataset, **settings}):
        trainer_of(tmp_path, max_steps=1, teacher_feature_cache=str(tmp_path / "c"), **options).train()
    assert len(folders(tmp_path / "c")) == 2


def test_image_that_changed_behind_the_fingerprint_is_refused(tmp_path):
    """The fingerprint reads three rows; the checksum of the pixels sees the others."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    cache = str(tmp_path / "c")
    trainer_of(tmp_path, images(), teacher_feature_cache=cache, max_steps=1).train()
    pixels[4] = 255 - pixels[4]
    rows = datasets.Dataset.from_dict({"image": list(pixels)}, datasets.Features({"image": datasets.Image()}))
    changed = ImageDataset(rows, ImageTransform(28, 0.5, 0.5, num_channels=1))
    with pytest.raises(DataError, match="row 4 is not the image"):
        trainer_of(tmp_path, changed, teacher_feature_cache=cache).train()
    assert len(folders(tmp_path / "c")) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_features_travel_with_their_image_through_the_loader(tmp_path, workers):
    dataset = images()
    trainer = trainer_of(
        tmp_path, dataset, teacher_feature_cache=str(tmp_path / "c"), max_steps=1, dataloader_num_workers=workers
    )
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    expected = torch.stack(trainer.targets(batch["pixel_values"]), dim=1)
    torch.testing.assert_close(batch["teacher_features"], expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1  # else any row would do


def test_evaluation_images_have_no_cached_features_and_need_none(tmp_path):
    trainer = trainer_of(tmp_path, images(), teacher_feature_cache=str(tmp_path / "c"), max_steps=1)
    trainer.train()
    plain = trainer_of(tmp_path, images(), max_steps=1)
    plain.train()
    losses = [each.evaluate(images(count=6, seed=5))["eval_loss"] for each in (trainer, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_random_crops_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="crop_scale=1 and horizontal_flip=0"):
        trainer_of(tmp_path, images(train=True), teacher_feature_cache=str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_data_that_nobody_can_identify_are_refused(tmp_path):
    with pytest.raises(UsageError, match="a list as train_dataset"):
        trainer_of(tmp_path, [{"pixel_values": torch.zeros(1, 28, 28)}], teacher_feature_cache=str(tmp_path / "c"))


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(UsageError, match="teacher_feature_cache_dtype='int8'"):
        FeatureAlignmentConfig(output_dir=str(tmp_path), teacher_feature_cache_dtype="int8", **QUIET)


def test_cache_that_does_not_fit_on_the_disk_is_refused_with_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    batches = [(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 5, 100))]
    with pytest.raises(UsageError, match=r"the features take 4\.00 GB, and 1\.00 GB are free"):
        feature_cache.build_cache(tmp_path / "c", {"images": 10**6}, batches, "float32")
    assert not list((tmp_path / "c").iterdir())


def test_features_beyond_float16_are_refused_and_leave_nothing(tmp_path):
    key = {"images": 1}
    batch = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 3, 4), 1e5)
    with pytest.raises(UsageError, match="use 'float32'"):
        feature_cache.build_cache(tmp_path / "c", key, [batch], "float16")
    assert not list((tmp_path / "c").iterdir())
    assert feature_cache.open_cache(tmp_path / "c", key) is None


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    trainer = trainer_of(tmp_path, images(), teacher_feature_cache=str(tmp_path / "c"))
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache.np, "save", full)
        with pytest.raises(CheckpointError, match="disk is full"):
            trainer.train()
    assert not list((tmp_path / "c").iterdir())
    trainer.train()
    assert len(folders(tmp_path / "c")) == 1


@pytest.mark.long
def test_killed_build_starts_again_and_is_never_used(tmp_path):
    script = f"""
import os, signal, torch
from trainers.data.feature_cache import build_cache
def batches():
    yield torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 3, 4)
    os.kill(os.getpid(), signal.SIGKILL)
build_cache({str(tmp_path / "c")!r}, {{"images": 4}}, batches(), "float32")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    key = {"images": 4}
    assert [path.name.endswith(".writing") for path in (tmp_path / "c").iterdir()] == [True]
    assert feature_cache.open_cache(tmp_path / "c", key) is None
    whole = [(torch.zeros(2, 1, 2, 2), torch.full((2, 1, 3, 4), float(i))) for i in range(2)]
    folder = feature_cache.build_cache(tmp_path / "c", key, whole, "float32")
    assert folder == feature_cache.open_cache(tmp_path / "c", key)
    assert np.load(folder / "features.npy")[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
    assert list((tmp_path / "c").iterdir()) == [folder]


# --- on the command line ---------------------------------------------------------------------------------------------


def test_distill_and_run_take_the_cache_and_keep_its_path_out_of_the_record(tmp_path, capsys):
    teacher, cache = save_teacher(tmp_path / "teacher"), tmp_path / "c"
    shared = {"dataset": "mnist-digits", "train_split": "train[:16]", "image_size": "28"}
    shared |= {"crop_scale": "1", "horizontal_flip": "0"}
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "teacher_feature_cache": str(cache), **QUIET}
    options = [part for name, value in {**shared, **settings}.items() for part in (f"--{name}", str(value))]
    assert main(["distill", teacher, "--output_dir", str(tmp_path / "2"), *options]) == 0
    assert len(folders(cache)) == 1
    recorded = (tmp_path / "2" / "manifest.json").read_text()
    assert str(cache) not in recorded
    assert json.loads(recorded)["stages"]["feature-alignment"]["settings"]["teacher_feature_cache_dtype"] == "float32"

    recipe = {name: yaml.safe_load(value) for name, value in shared.items()}
    recipe |= {
        "teacher": teacher,
        "stages": ["feature-alignment"],
        "feature_alignment": settings,
        "eval_split": "test[:8]",
    }
    recipe |= {"output_dir": str(tmp_path / "run"), "knn_images": 16}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = {path: path.stat().st_mtime_ns for path in folders(cache)[0].iterdir()}
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in folders(cache)[0].iterdir()} == before  # used, not made anew


def test_distill_refuses_the_cache_with_the_default_crops(tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher")
    options = ["--dataset", "mnist-digits", "--train_split", "train[:16]"]
    options += ["--teacher_feature_cache", str(tmp_path / "c"), "--output_dir", str(tmp_path / "2"), "--use_cpu"]
    assert main(["distill", teacher, *options, "--image_size", "28"]) != 0
    assert "crop_scale=1 and horizontal_flip=0" in capsys.readouterr().err
