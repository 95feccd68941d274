"""Image data sets: finding them, and reading them in spite of a few broken files.

`load_images` makes a `datasets` object of whatever the user names. `ImageDataset` and `StreamingImageDataset` turn
its rows into tensors; both decode the files themselves, so that a broken one is skipped, counted and named instead of
ending a run that may be hours old. What their DataLoader workers find reaches the main process through shared memory.
"""

import hashlib
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from modeling_adala.errors import DataError, UsageError

from .digits import DIGITS_NAME, DIGITS_SPLITS, load_digits

logger = logging.getLogger(__name__)

Transform: TypeAlias = Callable[[Image.Image, np.random.Generator], torch.Tensor]
HFDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset

_MAX_WORKERS = 256
_MIN_STREAMED = 100
_MIN_SHARDS = 8
_MAX_SHARDS = 64
_NAMED = 3
_HASHED_ROWS = 4
_EXIF_ORIENTATION = 0x0112


class BrokenImagesError(DataError):
    """More images are broken than `max_broken_fraction` allows."""

    def __init__(self, message: str) -> None:
        # PyTorch rebuilds a DataLoader worker's error from its whole traceback, which ends with the message.
        super().__init__(message.strip().split(f"{type(self).__name__}: ")[-1])


class _Unreadable(Exception):
    """One image does not decode; the message says why."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _columns(dataset: HFDataset) -> list[str]:
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def _undecoded(dataset: HFDataset, column: str) -> HFDataset:
    # Decoding inside `datasets` would raise on a broken file before its row is known.
    if dataset.features is None:
        return dataset
    feature = dataset.features[column]
    kind = getattr(feature, "dtype", None)
    is_struct = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    if not (
        isinstance(feature, datasets.Image)
        or is_struct
        or kind in ("string", "large_string", "binary", "large_binary")
    ):
        raise UsageError(
            f"image_column={column!r} holds {feature}, not images: name another of {', '.join(dataset.features)}"
        )
    return dataset.cast_column(column, datasets.Image(decode=False))


def _check_labels(dataset: HFDataset, column: str) -> None:
    feature = dataset.features[column] if dataset.features is not None else None
    if feature is None or isinstance(feature, datasets.ClassLabel):
        return
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise UsageError(
            f"label_column={column!r} holds {feature}, not class numbers: name another of "
            f"{', '.join(dataset.features)}, or convert it with datasets' class_encode_column"
        )


def _open_local(path: Path, streaming: bool) -> Any:
    if path.is_file():
        if path.suffix != ".parquet":
            raise UsageError(f"source={str(path)!r} is one file: give its folder, or a .parquet file")
        return datasets.load_dataset("parquet", data_files=str(path), streaming=streaming)
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path), streaming=streaming)


def _open_source(source: Any, streaming: bool) -> dict[str, HFDataset]:
    if isinstance(source, dict):
        return dict(source)
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        name = str(source.split)
        return {name if name.isidentifier() and name != "None" else "train": source}
    if source == DIGITS_NAME:
        return {name: load_digits(name) for name in DIGITS_SPLITS}
    if not isinstance(source, str | Path):
        raise UsageError(f"source={source!r} is not a data set: use a path, a Hub id or a datasets.Dataset")
    path = Path(source).expanduser()
    try:
        if path.exists():
            opened = _open_local(path, streaming)
        elif str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1 or path.suffix == ".parquet":
            raise DataError(f"source={str(source)!r} does not exist: check the path")
        else:
            opened = datasets.load_dataset(str(source), streaming=streaming)
    except (DataError, UsageError):
        raise
    except Exception as error:
        if path.exists():
            raise DataError(
                f"source={str(source)!r} holds no data set that can be read ({_first_line(error)}): "
                "give a folder of images, of one subfolder per class, or of parquet files"
            ) from error
        raise DataError(
            f"source={str(source)!r} is neither a local path nor a data set that the Hub gives out now "
            f"({_first_line(error)}): check the name and the network, or give a folder of images"
        ) from error
    return _open_source(opened, streaming)


def _pick_split(splits: dict[str, HFDataset], split: str | None) -> HFDataset:
    available = ", ".join(splits)
    if split is None:
        if len(splits) > 1 and "train" not in splits:
            raise UsageError(f"split=None: the data set has no split 'train'; name one of {available}")
        return splits["train"] if "train" in splits else next(iter(splits.values()))
    if split in splits:
        return splits[split]
    if any(isinstance(dataset, datasets.IterableDataset) for dataset in splits.values()):
        hint = " (a stream cannot be sliced: use streaming=False)" if "[" in split else ""
        raise UsageError(f"split={split!r} does not exist{hint}: use one of {available}")
    try:
        lengths = {name: len(dataset) for name, dataset in splits.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise UsageError(f"split={split!r} does not exist ({_first_line(error)}): use one of {available}") from error
    return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])


def load_images(
    source: Any,
    split: str | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    streaming: bool = False,
    require_labels: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Opens a data set of images.

    Args:
        source: an object of `datasets` (also one with splits); the path of a folder of images (subfolders are
            classes), of a folder of parquet files (splits come from their names), of one parquet file, or of what
            `save_to_disk` wrote; "mnist-digits"; or else the id of a data set on the Hub.
        split: such as "train", or "train[:500]" where the data set is not streamed. None takes the only split or
            "train".
        image_column: column of the images: their files' bytes, paths, or both.
        label_column: column of the class numbers.
        streaming: reads while iterating instead of first preparing the whole data set.
        require_labels: whether a missing label column is an error.

    Returns:
        The data set, its image column undecoded (`datasets.Image(decode=False)`).

    Raises:
        UsageError: the split or a column does not exist or is of the wrong type.
        DataError: the source cannot be opened, or is empty.
    """
    dataset = _pick_split(_open_source(source, streaming), split).with_format(None)
    is_empty = len(dataset) == 0 if isinstance(dataset, datasets.Dataset) else next(iter(dataset), None) is None
    if is_empty:
        name = source if isinstance(source, str | Path) else type(source).__name__
        raise DataError(f"source={str(name)!r} with split={split!r} has no images: choose another split or source")
    if streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=min(_MAX_SHARDS, len(dataset)))
    elif streaming and dataset.num_shards < _MIN_SHARDS:
        # DataLoader workers share a stream by shards; a parquet file can give one for each row group.
        dataset = dataset.reshard()
    columns = _columns(dataset)
    if image_column not in columns:
        raise UsageError(f"image_column={image_column!r} does not exist: use one of {', '.join(columns)}")
    if require_labels:
        if label_column not in columns:
            raise UsageError(
                f"label_column={label_column!r} does not exist: use one of {', '.join(columns)} "
                "(a folder of images has labels when it has one subfolder per class)"
            )
        _check_labels(dataset, label_column)
    return _undecoded(dataset, image_column)


def class_names(dataset: datasets.Dataset | datasets.IterableDataset, label_column: str = "label") -> list[str] | None:
    """Names of the classes, in the order of their numbers.

    Returns:
        The names of a `ClassLabel` column; else "0", "1", ... up to the largest number in a map-style data set; else
        None.

    Raises:
        UsageError: the column does not exist, or does not hold class numbers.
    """
    columns = _columns(dataset)
    if label_column not in columns:
        raise UsageError(f"label_column={label_column!r} does not exist: use one of {', '.join(columns)}")
    _check_labels(dataset, label_column)
    if dataset.features is not None and isinstance(dataset.features[label_column], datasets.ClassLabel):
        return list(dataset.features[label_column].names)
    if not isinstance(dataset, datasets.Dataset):
        return None
    labels = [label for label in dataset.unique(label_column) if label is not None]
    return [str(label) for label in range(max(labels, default=-1) + 1)]


def fingerprint(dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    """Short id of a data set's content, for a manifest: the same in every process and on every machine.

    It covers the number of rows, the columns and their types, and the bytes of the first, middle and last row (of a
    stream, of the first four). `datasets`' own fingerprint also covers paths and times.

    Returns:
        16 hexadecimal digits.
    """
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    size = len(dataset) if isinstance(dataset, datasets.Dataset) else None
    features = dataset.features.to_dict() if dataset.features is not None else None
    digest = hashlib.sha256(json.dumps([size, features], sort_keys=True, default=str).encode())
    rows = (
        dataset.take(_HASHED_ROWS) if size is None else (dataset[i] for i in sorted({0, size // 2, size - 1}) if size)
    )
    for row in rows:
        for name in sorted(row):
            value = row[name]
            digest.update(name.encode())
            if isinstance(value, dict) and set(value) == {"bytes", "path"}:
                digest.update(_encoded(value) or Path(value["path"] or "").name.encode())
            else:
                digest.update(value.tobytes() if isinstance(value, Image.Image) else repr(value).encode())
    return digest.hexdigest()[:16]


def _encoded(value: Any) -> bytes | None:
    """The bytes of an image file, or None if they are not at hand (a missing file, a path inside an archive)."""
    if isinstance(value, str):
        value = {"bytes": None, "path": value}
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        path = value.get("path")
        if path is not None and "://" not in path and Path(path).is_file():
            return Path(path).read_bytes()
    return None


def _open_image(value: Any, draft_size: Callable[[tuple[int, int]], tuple[int, int] | None] | None) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    encoded = _encoded(value)
    if encoded == b"":
        raise _Unreadable("the file is empty")
    if encoded is None:
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str):
            raise _Unreadable("the row has no image")
        if "://" not in path:
            raise _Unreadable("the file does not exist")
        return datasets.Image().decode_example({"bytes": None, "path": path})
    image: Image.Image = Image.open(io.BytesIO(encoded))
    if draft_size is not None and (size := draft_size(image.size)) is not None:
        # A JPEG decodes several times faster at 1/2, 1/4 or 1/8 of its size; other formats ignore this.
        image.draft(None, size)
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image


def _why_unreadable(value: Any) -> str | None:
    """Why an image does not decode; None if it does, so that a transform's own error is not blamed on the file."""
    try:
        _open_image(value, None).convert("RGB")
    except _Unreadable as error:
        return str(error)
    except UnidentifiedImageError:
        return "Pillow does not know its format"
    except Exception as error:
        return _first_line(error)
    return None


class _ImageReader:
    """What map-style and streamed images share: a row to an example, and a count of the rows that are broken."""

    def __init__(
        self,
        dataset: HFDataset,
        transform: Transform,
        image_column: str,
        label_column: str | None,
        seed: int,
        max_broken_fraction: float,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise UsageError(f"seed={seed!r} must be an integer of 0 or more")
        if not 0 <= max_broken_fraction <= 1:
            raise UsageError(f"max_broken_fraction={max_broken_fraction!r} must be a fraction of 0..1")
        columns = _columns(dataset)
        wanted = {"image_column": image_column} | ({} if label_column is None else {"label_column": label_column})
        for argument, column in wanted.items():
            if column not in columns:
                raise UsageError(f"{argument}={column!r} does not exist: use one of {', '.join(columns)}")
        if label_column is not None:
            _check_labels(dataset, label_column)
        self.dataset = _undecoded(dataset.with_format(None), image_column).select_columns(list(wanted.values()))
        self.transform, self.image_column, self.label_column = transform, image_column, label_column
        self.seed, self.max_broken_fraction = seed, max_broken_fraction
        # Shared memory, or persistent DataLoader workers would stay in their first epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that the augmentation is drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, also in running DataLoader workers: every epoch has its own crops."""
        self._epoch.fill_(epoch)

    def _example(self, row: dict[str, Any], key: int, name: str) -> dict[str, Any]:
        """Makes an example of a row. Raises `_Unreadable` for a broken image; any other error is not the image's."""
        value = row[self.image_column]
        rng = np.random.default_rng([self.seed, self.epoch, key])
        try:
            image = _open_image(value, getattr(self.transform, "draft_size", None))
            example: dict[str, Any] = {"pixel_values": self.transform(image, rng)}
        except Exception as error:
            reason = _why_unreadable(value)
            if reason is None:
                raise
            raise _Unreadable(reason) from error
        if self.label_column is not None:
            label = row[self.label_column]
            if label is None:
                raise DataError(f"label_column={self.label_column!r} is empty in {name}: remove the row or label it")
            example["labels"] = int(label)
        return example

    def _name(self, row: dict[str, Any], place: str) -> str:
        value = row[self.image_column]
        path = value if isinstance(value, str) else value.get("path") if isinstance(value, dict) else None
        if path is None:
            return place
        return path if isinstance(value, str) or value.get("bytes") is None else f"{place} ({path})"

    def _too_many(self, count: int, total: int, names: list[str]) -> BrokenImagesError:
        return BrokenImagesError(
            f"{count:,} of {total:,} images cannot be read, more than "
            f"max_broken_fraction={self.max_broken_fraction:g}; the first: {', '.join(names)}; "
            "repair or remove them, or raise max_broken_fraction"
        )


class ImageDataset(_ImageReader, torch.utils.data.Dataset):
    """Map-style data set of examples `{"pixel_values": float (C, H, W)}`, plus `"labels": int` with a label column.

    The augmentation of row i is drawn from (seed, epoch, i) alone: it does not depend on the workers, the processes,
    the order, or on where a run was resumed. A row whose image does not decode is logged once and replaced by the next
    row that does.

    Args:
        dataset: map-style data set, such as from `load_images`.
        transform: called with a PIL image and a `numpy.random.Generator`; such as `ImageTransform`.
        image_column: column of the images.
        label_column: column of the class numbers; None leaves labels out.
        seed: of the augmentation.
        max_broken_fraction: largest share of rows that may be broken.

    Raises:
        UsageError: an argument is wrong, or a column is missing.
        DataError: (from indexing) a label is missing.
        BrokenImagesError: (from indexing) too many rows are broken; a `DataError`.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Transform,
        *,
        image_column: str = "image",
        label_column: str | None = None,
        seed: int = 0,
        max_broken_fraction: float = 0.01,
    ) -> None:
        super().__init__(dataset, transform, image_column, label_column, seed, max_broken_fraction)
        self._broken = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self)
        first = int(index) + size if index < 0 else int(index)
        if not 0 <= first < size:
            raise IndexError(f"index {index} is out of range for {size} images")
        for row_index in ((first + step) % size for step in range(size)):
            if self._broken[row_index]:
                continue
            row = self.dataset[row_index]
            name = self._name(row, f"row {row_index}")
            try:
                return self._example(row, first, name)
            except _Unreadable as error:
                self._add_broken(row_index, name, str(error))
        raise self._too_many(size, size, self._first_broken())

    @property
    def num_broken(self) -> int:
        """Number of rows found broken so far, in all workers of this process."""
        return int(self._broken.sum())

    @property
    def broken_indices(self) -> list[int]:
        """The rows found broken so far, in ascending order."""
        return self._broken.nonzero().flatten().tolist()

    def summary(self) -> str:
        """Such as "50,000 images, 3 skipped as unreadable"."""
        return f"{len(self):,} images, {self.num_broken:,} skipped as unreadable"

    def _first_broken(self) -> list[str]:
        return [self._name(self.dataset[index], f"row {index}") for index in self.broken_indices[:_NAMED]]

    def _add_broken(self, index: int, name: str, reason: str) -> None:
        self._broken[index] = 1
        logger.warning("skipped %s: %s", name, reason)
        count = self.num_broken
        if count > self.max_broken_fraction * len(self):
            raise self._too_many(count, len(self), self._first_broken())


class StreamingImageDataset(_ImageReader, torch.utils.data.IterableDataset):
    """Stream of the examples that `ImageDataset` gives, over a `datasets.IterableDataset`.

    DataLoader workers share the stream by its shards, each image going to one of them; workers beyond the number of
    shards stay idle. A worker does not know an image's place in the whole stream, so the augmentation is drawn from
    (seed, epoch, checksum of the image's file). Broken images are logged and dropped.

    Args:
        dataset: stream, such as from `load_images(..., streaming=True)`; shuffle it before.
        transform: called with a PIL image and a `numpy.random.Generator`; such as `ImageTransform`.
        image_column: column of the images.
        label_column: column of the class numbers; None leaves labels out.
        seed: of the augmentation.
        max_broken_fraction: largest share of the images seen (or of 100, if those are more) that may be broken.

    Raises:
        UsageError: an argument is wrong, or a column is missing.
        DataError: (from iterating) a label is missing.
        BrokenImagesError: (from iterating) too many images are broken; a `DataError`.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Transform,
        *,
        image_column: str = "image",
        label_column: str | None = None,
        seed: int = 0,
        max_broken_fraction: float = 0.01,
    ) -> None:
        super().__init__(dataset, transform, image_column, label_column, seed, max_broken_fraction)
        # Images seen and broken in this pass; a row for each worker, as there is no atomic addition.
        self._counts = torch.zeros((_MAX_WORKERS, 2), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the augmentation and of the stream's shuffling, also in running workers."""
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        slot, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._counts[slot::workers] = 0
        counts, names = self._counts[slot % _MAX_WORKERS], []
        for position, row in enumerate(self.dataset):
            counts[0] += 1
            place = f"row {position}" + (f" of worker {slot}" if workers > 1 else "")
            name = self._name(row, place)
            key = self._load_bytes(row)
            try:
                example = self._example(row, key, name)
            except _Unreadable as error:
                counts[1] += 1
                names.append(name)
                logger.warning("skipped %s: %s", name, error)
                seen, broken = self._counts.sum(dim=0).tolist()
                if broken > self.max_broken_fraction * max(seen, _MIN_STREAMED):
                    raise self._too_many(broken, seen, names[:_NAMED]) from error
            else:
                yield example

    @property
    def num_broken(self) -> int:
        """Number of images found broken in the current or last pass, in all workers of this process."""
        return int(self._counts[:, 1].sum())

    def summary(self) -> str:
        """Such as "50,000 images, 3 skipped as unreadable", of the current or last pass."""
        seen, broken = self._counts.sum(dim=0).tolist()
        return f"{seen:,} images, {broken:,} skipped as unreadable"

    def _load_bytes(self, row: dict[str, Any]) -> int:
        """Puts the image's file into the row, if it is at hand, and returns its checksum."""
        value = row[self.image_column]
        if isinstance(value, Image.Image):
            return zlib.crc32(value.tobytes())
        encoded = _encoded(value)
        if encoded is None:
            return zlib.crc32(str(value).encode())
        row[self.image_column] = encoded
        return zlib.crc32(encoded)


def collate_images(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Makes a batch: `pixel_values` (B, C, H, W) and, where the examples have them, int64 `labels` (B,)."""
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([example["labels"] for example in examples], dtype=torch.int64)
    return batch
