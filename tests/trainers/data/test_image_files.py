"""What may be opened: the dataset's own files, no URLs, nothing else of this machine; and what is no dataset."""

import contextlib
import io
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import save_teacher

from modeling_adala import DataError, UsageError
from trainers import DataConfig, DataModule, ImageDataset, RecipeConfig, SegmentationData, load_images
from trainers.data.image_dataset import BrokenImagesError
from trainers.data.image_files import Unreadable, open_image
from trainers.data.sources import describe, image_files
from trainers.data.transforms import ImageTransform
from vit_adala.cli import main

MODEL = SimpleNamespace(image_size=28, patch_size=7, num_channels=1)
# as they are in a row: not by `datasets.Image`, which would put the file into the table
RAW = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (28, 28), value).save(file, "png")
    return file.getvalue()


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # `datasets` waits 5 s whenever a parquet stream is closed, for threads that are long done here
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)


@pytest.fixture
def server():
    """An HTTP server that gives an image for any path, and the requests that it got."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(png())))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(png() if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/secret.png", requests=requests)
    server.shutdown()
    server.server_close()
    thread.join()


def table(folder: Path, paths: list[str], kind: str = "parquet") -> str:
    """A dataset of rows that name files, and its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        (folder / "train.csv").write_text("image\n" + "".join(f"{path}\n" for path in paths))
    else:
        rows = {"image": [{"bytes": None, "path": path} for path in paths]}
        features = datasets.Features(image=RAW)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


def examples(source, **settings) -> list[dict]:
    dataset = DataModule(DataConfig(dataset=source, **settings), MODEL).train_dataset(0)
    return [dataset[0]] if isinstance(dataset, ImageDataset) else [next(iter(dataset))]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_open_the_data_sets_own_files_only(tmp_path, kind, streaming):
    outside = tmp_path / "elsewhere" / "secret.png"
    outside.parent.mkdir()
    outside.write_bytes(png())
    own = tmp_path / "data" / "images" / "a.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(png())
    assert len(examples(table(tmp_path / "data", [str(own)], kind), streaming=streaming)) == 1
    (tmp_path / "link").symlink_to(tmp_path / "data")  # such as a folder on another disk
    assert len(examples(str(tmp_path / "link"), streaming=streaming)) == 1
    for number, path in enumerate([outside, own.parent / ".." / ".." / "elsewhere" / "secret.png"]):
        source = table(tmp_path / f"evil-{number}", [str(path)] * 3, kind)
        with pytest.raises(BrokenImagesError, match=r"not inside the folder.*allow_external_images"):
            examples(source, streaming=streaming)
        assert len(examples(source, streaming=streaming, allow_external_images=True)) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_fetch_no_urls(tmp_path, server, kind, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    source = table(tmp_path / "data", [server.url] * 3, kind)
    with pytest.raises(BrokenImagesError, match=r"URLs in rows are not fetched.*allow_external_images"):
        examples(source, streaming=streaming)
    assert server.requests == []
    assert len(examples(source, streaming=streaming, allow_external_images=True)) == 1
    assert server.requests


def test_masks_fetch_no_urls_and_open_no_other_files(tmp_path, server, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    (tmp_path / "outside.png").write_bytes(png())
    for number, path in enumerate([server.url, str(tmp_path / "outside.png")]):
        rows = {"image": [{"bytes": png(), "path": None}] * 3, "label": [{"bytes": None, "path": path}] * 3}
        folder = tmp_path / f"masks-{number}"
        folder.mkdir()
        features = datasets.Features(image=RAW, label=RAW)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
        data = SegmentationData(DataConfig(dataset=str(folder)), MODEL, labels=["a"])
        with pytest.raises(BrokenImagesError, match="allow_external_images"):
            data.train_dataset(0)[0]
    assert server.requests == []


def test_objects_of_the_callers_own_open_local_files_but_no_urls(tmp_path, server):
    (tmp_path / "a.png").write_bytes(png())
    assert len(examples(datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}))) == 1
    with pytest.raises(BrokenImagesError, match="URLs in rows are not fetched"):
        examples(datasets.Dataset.from_dict({"image": [server.url] * 3}))
    assert server.requests == []


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("hf://datasets/org/name@0123/train/a.png", True),
        ("zip://train/a.png::hf://datasets/org/name@0123/train.zip", True),
        ("hf://datasets/org/name-of-another@0123/a.png", False),
        ("hf://datasets/other/name@0123/a.png", False),
        ("https://huggingface.co/datasets/org/name/resolve/main/a.png", False),
        ("http://127.0.0.1/::hf://datasets/org/name@0123/a.png", False),
        ("file:///etc/passwd", False),
        ("/etc/passwd", False),
        ("etc/passwd", False),
    ],
)
def test_data_set_on_the_hub_opens_files_of_its_repository(path, allowed):
    files = image_files("org/name")
    if allowed:
        files.check(path)
        return
    with pytest.raises(Unreadable):
        files.check(path)
    image_files("org/name", external=True).check(path)


def test_files_of_a_downloaded_folder_are_the_data_sets_own(tmp_path, monkeypatch):
    import trainers.data.sources as sources

    monkeypatch.setattr(sources, "HF_HUB_CACHE", str(tmp_path))
    image_files("org/name").check(str(tmp_path / "datasets--org--name" / "snapshots" / "0123" / "a.png"))


# --- broken images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_image_with_pixels_that_are_no_numbers_is_broken(tmp_path, value):
    pixels = np.full((28, 28), 0.5, dtype=np.float32)
    for number, corner in enumerate((0.5, value)):
        pixels[0, 0] = corner
        Image.fromarray(pixels).save(tmp_path / f"{number}.tiff")
    dataset = ImageDataset(load_images(tmp_path), ImageTransform(28, 0.0, 1.0, num_channels=1), max_broken_fraction=1)
    assert torch.equal(dataset[1]["pixel_values"], dataset[0]["pixel_values"])
    assert dataset.broken_indices == [1]
    with pytest.raises(Unreadable, match="NaN or infinite"):
        open_image(str(tmp_path / "1.tiff"))


def broken_folder(folder: Path) -> str:
    for label in ("a", "b"):
        for number in range(5):
            path = folder / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"" if (label, number) == ("a", 2) else png(20 * number))
    return str(folder)


def test_share_of_broken_images_is_a_setting_of_the_data(tmp_path):
    source = broken_folder(tmp_path / "data")
    for settings in ({}, {"streaming": True}):
        dataset = DataModule(DataConfig(dataset=source, max_broken_fraction=0.2, **settings), MODEL).train_dataset(0)
        assert dataset.max_broken_fraction == 0.2
    with pytest.raises(BrokenImagesError, match=r"1 of 10.*the file is empty.*raise max_broken_fraction"):
        DataModule(DataConfig(dataset=source), MODEL).train_dataset(0)[2]
    assert RecipeConfig(teacher="t", dataset=source, max_broken_fraction="0.2").max_broken_fraction == 0.2
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="max_broken_fraction"):
            DataConfig(dataset=source, max_broken_fraction=wrong)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return save_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.mark.parametrize(("options", "code"), [((), 1), (("--max-broken-fraction", "0.2"), 0)])
def test_share_of_broken_images_is_a_flag(tmp_path, capsys, teacher, options, code):
    argv = ["align", teacher, "--dataset", broken_folder(tmp_path / "data"), "--max-steps", "3"]
    argv += ["--per-device-train-batch-size", "4", "--calibration-images", "10", "--bf16", "false"]
    argv += ["--use-cpu", "true", "--disable-tqdm", "true", "--output-dir", str(tmp_path / "out"), *options]
    assert main(argv) == code
    captured = capsys.readouterr()
    assert ("1 skipped as unreadable" in captured.out) if code == 0 else ("max_broken_fraction" in captured.err)


# --- what is no dataset ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/proc", "/proc/self", "/sys", "/"])
def test_file_systems_of_the_kernel_are_refused_at_once(place):
    if not os.path.isdir(place):
        pytest.skip("not on this machine")
    start = time.perf_counter()
    with pytest.raises(DataError, match="not a folder of files"):
        load_images(place)
    assert time.perf_counter() - start < 1


def test_large_folder_without_data_is_not_walked_to_its_end(tmp_path, monkeypatch):
    import trainers.data.sources as sources

    monkeypatch.setattr(sources, "_ENTRIES", 20)
    seen = []
    walk = os.walk

    def counted(path):
        for place in walk(path):
            seen.append(place[0])
            yield place

    monkeypatch.setattr(os, "walk", counted)
    for number in range(100):
        (tmp_path / f"{number:03d}").mkdir()
        (tmp_path / f"{number:03d}" / "notes.doc").write_text("x")
    with pytest.raises(DataError, match="no image and no table"):
        load_images(tmp_path)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\nb", ["'a\\nb'", "check the name"]),
        ("a\0b", ["check the name"]),
        ("a b/c d", ["'a b/c d'", "check the name"]),
        ("x" * 5000, ["too long"]),
        ("/" + "x" * 5000, ["too long"]),
        ("/dev/null", ["'/dev/null'", "not a folder of files"]),
    ],
    ids=["newline", "null byte", "spaces", "long name", "long path", "device"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_are_none_are_told_in_one_line(name, words, streaming):
    with pytest.raises(DataError) as error:
        DataModule(DataConfig(dataset=name, streaming=streaming), MODEL)
    message = str(error.value)
    assert message.startswith("source=") and "\n" not in message and "\0" not in message
    assert all(word in message for word in words), message


def test_sources_in_one_text():
    memory = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}]})
    assert describe("org/name") == "org/name" and describe(Path("/a/b")) == "/a/b"
    text = describe(memory)
    assert text.startswith("Dataset(") and text == describe(datasets.Dataset.from_list(memory.to_list()))
    assert text != describe(datasets.concatenate_datasets([memory, memory]))
    assert describe(datasets.DatasetDict({"train": memory})) == f"DatasetDict(train={text})"


def test_teacher_feature_cache_that_is_a_file_is_refused_before_training(tmp_path, capsys, teacher):
    (tmp_path / "file").write_text("x")
    for cache in ("file", "file/cache"):
        argv = ["distill", teacher, "--dataset", "mnist-digits", "--crop-scale", "1"]
        argv += ["--horizontal-flip", "0", "--teacher-feature-cache", str(tmp_path / cache), "--max-steps", "1"]
        argv += ["--bf16", "false", "--use-cpu", "true", "--output-dir", str(tmp_path / "out")]
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "teacher_feature_cache=" in line and "is a file; pass a folder" in line
    assert not (tmp_path / "out").exists()
