"""Image datasets that skip, count and name the few files that are broken.

`ImageDataset` and `StreamingImageDataset` turn rows into tensors and decode the files themselves, so that a broken one
is skipped, counted and named instead of ending a run that may be hours old. What DataLoader workers find reaches
the main process through shared memory.
"""

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, TypeAlias, cast

import datasets
import numpy as np
import torch
from PIL import Image

from modeling_adala.errors import DataError, UsageError

from .image_files import LOCAL_FILES, ImageFiles, Unreadable, blaming, encoded_bytes, open_image
from .sources import HFDataset, check_labels, columns_of, undecoded

logger = logging.getLogger(__name__)

Transform: TypeAlias = Callable[[Image.Image, np.random.Generator], torch.Tensor]

_MAX_WORKERS = 256
_MIN_STREAMED = 100
_NAMED = 3


class RowError(DataError):
    """Raised for a row of the data that is wrong; the message names it."""

    def __init__(self, message: str) -> None:
        # PyTorch rebuilds a DataLoader worker's error from its whole traceback, which ends with the message.
        super().__init__(message.strip().split(f"{type(self).__name__}: ")[-1])


class BrokenImagesError(RowError):
    """Raised when more images are broken than `max_broken_fraction` allows."""


class ImageReader:
    """Base of the map-style and the streamed dataset: turns a row into an example."""

    def __init__(
        self,
        dataset: HFDataset,
        transform: Transform,
        *,
        image_column: str = "image",
        label_column: str | None = None,
        seed: int = 0,
        max_broken_fraction: float = 0.01,
        label_ids: Sequence[int] | None = None,
        files: ImageFiles = LOCAL_FILES,
    ) -> None:
        columns = columns_of(dataset)
        wanted = {"image_column": image_column} | ({} if label_column is None else {"label_column": label_column})
        for argument, column in wanted.items():
            if column not in columns:
                raise UsageError(f"{argument}={column!r} does not exist; use one of {', '.join(columns)}.")
        dataset = dataset.with_format(None)
        if label_column is not None:
            dataset = self._with_labels(dataset, label_column)
        self.dataset = undecoded(dataset, image_column).select_columns(list(wanted.values()))
        self.transform, self.image_column, self.label_column = transform, image_column, label_column
        self.seed, self.max_broken_fraction = seed, max_broken_fraction
        self.label_ids, self.files = label_ids, files
        # Shared memory, or persistent DataLoader workers would stay in their first epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Epoch that the augmentation is drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, also in running DataLoader workers: every epoch has its own crops."""
        self._epoch.fill_(epoch)

    def _with_labels(self, dataset: HFDataset, column: str) -> HFDataset:
        check_labels(dataset, column)
        return dataset

    def _rng(self, key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, key])

    def _example(self, row: dict[str, Any], key: int, name: str) -> dict[str, Any]:
        """Return the example of a row. Raises `Unreadable` for a broken image."""
        value, rng = row[self.image_column], self._rng(key)
        with blaming(value, self.files):
            image = open_image(value, getattr(self.transform, "draft_size", None), self.files)
            example: dict[str, Any] = {"pixel_values": self.transform(image, rng)}
        if self.label_column is not None:
            example["labels"] = self._class_number(int(self._label(row, name)), name)
        return example

    def _label(self, row: dict[str, Any], name: str) -> Any:
        label = row[cast(str, self.label_column)]
        if label is None:
            raise RowError(f"label_column={self.label_column!r} is empty in {name}; remove the row or label it.")
        return label

    def _class_number(self, label: int, name: str) -> int:
        if label < 0:
            raise RowError(f"label_column={self.label_column!r} is {label} in {name}; remove the row or label it.")
        if self.label_ids is None:
            return label
        if label >= len(self.label_ids) or self.label_ids[label] < 0:
            raise RowError(
                f"label_column={self.label_column!r} is {label} in {name}, which is not one of"
                f" the {len(self.label_ids)} classes; repair the row."
            )
        return self.label_ids[label]

    def _name(self, row: dict[str, Any], place: str) -> str:
        value = row[self.image_column]
        path = value if isinstance(value, str) else value.get("path") if isinstance(value, dict) else None
        if path is None:
            return place
        return path if isinstance(value, str) or value.get("bytes") is None else f"{place} ({path})"

    def _too_many(self, count: int, total: int, names: list[str], reason: str) -> BrokenImagesError:
        return BrokenImagesError(
            f"{count:,} of {total:,} images cannot be read, more than "
            f"max_broken_fraction={self.max_broken_fraction:g}; the first: {', '.join(names)}; the last because"
            f" {reason}; repair or remove them, or raise max_broken_fraction."
        )


class ImageDataset(ImageReader, torch.utils.data.Dataset):
    """Map-style dataset of examples `{"pixel_values": float (C, H, W)}`, plus `"labels": int` with a label column.

    The augmentation of row i is drawn from (seed, epoch, i) alone: it does not depend on the workers, the processes,
    the order, or on where a run was resumed. A row whose image does not decode is logged once and replaced by the next
    row that does.

    Args:
        dataset (`datasets.Dataset`): Such as from `load_images`.
        transform (`Callable`): Called with a PIL image and a `numpy.random.Generator`; such as `ImageTransform`.
        image_column (`str`, *optional*, defaults to `"image"`): Column of the images.
        label_column (`str`, *optional*): Column of the class numbers. Default: examples have no labels.
        seed (`int`, *optional*, defaults to 0): Seed of the augmentation.
        max_broken_fraction (`float`, *optional*, defaults to 0.01): Largest share of rows that may be broken.
        label_ids (`Sequence[int]`, *optional*): Label to give for each class number of the column, -1 for none.
            Default: the numbers as they are.
        files (`ImageFiles`, *optional*): Files that rows may name, see `sources.image_files`. Default: all local ones.

    Raises:
        UsageError: If a column is missing.
        DataError: On indexing, for a label that is missing, negative, or none of the classes.
        BrokenImagesError: On indexing, if too many rows are broken; a `DataError`.

    Example:

    ```python
    rows = load_digits("test").select(range(4))
    transform = ImageTransform((28, 28), image_mean=0.5, image_std=0.5, num_channels=1)
    dataset = ImageDataset(rows, transform, label_column="label")
    ```
    """

    def __init__(self, dataset: datasets.Dataset, transform: Transform, **kwargs: Any) -> None:
        super().__init__(dataset, transform, **kwargs)
        self._broken = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self)
        first = int(index) + size if index < 0 else int(index)
        if not 0 <= first < size:
            raise IndexError(f"index {index} is out of range for {size} images")
        reason = "of what was logged before"
        for row_index in ((first + step) % size for step in range(size)):
            if self._broken[row_index]:
                continue
            row = self.dataset[row_index]
            name = self._name(row, f"row {row_index}")
            try:
                return self._example(row, first, name)
            except Unreadable as error:
                reason = str(error)
                self._add_broken(row_index, name, reason)
        raise self._too_many(size, size, self._first_broken(), reason)

    @property
    def broken_indices(self) -> list[int]:
        """Return the rows found broken so far, in ascending order."""
        return self._broken.nonzero().flatten().tolist()

    def summary(self) -> str:
        """Return a line such as "50,000 images, 3 skipped as unreadable"."""
        return f"{len(self):,} images, {len(self.broken_indices):,} skipped as unreadable"

    def _first_broken(self) -> list[str]:
        return [self._name(self.dataset[index], f"row {index}") for index in self.broken_indices[:_NAMED]]

    def _add_broken(self, index: int, name: str, reason: str) -> None:
        self._broken[index] = 1
        logger.warning("skipped %s: %s", name, reason)
        count = len(self.broken_indices)
        if count > self.max_broken_fraction * len(self):
            raise self._too_many(count, len(self), self._first_broken(), reason)


class StreamingImageDataset(ImageReader, torch.utils.data.IterableDataset):
    """Stream of the examples that `ImageDataset` gives, over a `datasets.IterableDataset`.

    DataLoader workers share the stream by its shards, each image going to one of them; workers beyond the number of
    shards stay idle. A worker does not know an image's place in the whole stream, so the augmentation is drawn from
    (seed, epoch, checksum of the image's file). Broken images are logged and dropped.

    Args:
        dataset (`datasets.IterableDataset`): Such as from `load_images(..., streaming=True)`.
        transform, image_column, label_column, label_ids, files: As for `ImageDataset`.
        seed (`int`, *optional*, defaults to 0): Seed of the augmentation and of the order.
        max_broken_fraction (`float`, *optional*, defaults to 0.01): Largest share of the images seen (or of 100, if
            those are more) that may be broken.
        shuffle_buffer (`int`, *optional*, defaults to 1): Images (their files) that each worker holds at once to draw
            the next one from, after the order of the shards has been drawn; another order in every epoch. 1 leaves
            the order as it is.
        repeat (`bool`, *optional*, defaults to `False`): Start over when the stream ends, in the next epoch, without
            end. A place in it can be found again, as resuming a training requires.

    Raises:
        UsageError: If a column is missing.
        DataError: On iterating, for a label that is missing, negative, or none of the classes.
        BrokenImagesError: On iterating, if too many images are broken; a `DataError`.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Transform,
        *,
        shuffle_buffer: int = 1,
        repeat: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, transform, **kwargs)
        self.shuffle_buffer, self.repeat = shuffle_buffer, repeat
        # Of this process: workers that repeat the stream do not all come to its end at once.
        self._pass = 0
        # Images seen and broken in this iteration; a row for each worker, as there is no atomic addition.
        self._counts = torch.zeros((_MAX_WORKERS, 2), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return super().epoch + self._pass

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the augmentation and of the stream's shuffling, also in running workers."""
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        slot, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._counts[slot::workers] = 0
        for number in count() if self.repeat else (0,):
            self._pass, is_empty = number, True
            for example in self._one_pass(slot, f" of worker {slot}" if workers > 1 else ""):
                is_empty = False
                yield example
            if is_empty:  # no shard for this worker, or not one image that could be read
                return

    def _one_pass(self, slot: int, of_worker: str) -> Iterator[dict[str, Any]]:
        counts, names = self._counts[slot % _MAX_WORKERS], []
        for position, row in enumerate(self._rows()):
            counts[0] += 1
            name = self._name(row, f"row {position}{of_worker}")
            try:
                key = self._load_bytes(row)
                example = self._example(row, key, name)
            except Unreadable as error:
                counts[1] += 1
                names.append(name)
                logger.warning("skipped %s: %s", name, error)
                seen, broken = self._counts.sum(dim=0).tolist()
                if broken > self.max_broken_fraction * max(seen, _MIN_STREAMED):
                    raise self._too_many(broken, seen, names[:_NAMED], str(error)) from error
            else:
                yield example

    def _rows(self) -> datasets.IterableDataset:
        if self.shuffle_buffer == 1:
            return self.dataset
        # by a seed of its own: the epoch of `datasets` is shared by the workers, which may be in different ones
        seed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        return self.dataset.shuffle(seed=seed, buffer_size=self.shuffle_buffer)

    def summary(self) -> str:
        """Return the line of `ImageDataset`, of the images seen in the current or last iteration."""
        seen, broken = self._counts.sum(dim=0).tolist()
        return f"{seen:,} images, {broken:,} skipped as unreadable"

    def _load_bytes(self, row: dict[str, Any]) -> int:
        """Put the image's file into the row, if it can be read here, and return its checksum."""
        value = row[self.image_column]
        if isinstance(value, Image.Image):
            return zlib.crc32(value.tobytes())
        encoded = encoded_bytes(value, self.files)
        if encoded is None:
            return zlib.crc32(str(value).encode())
        row[self.image_column] = encoded
        return zlib.crc32(encoded)


def collate_images(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch: `pixel_values` (B, C, H, W) and, where the examples have them, `labels`.

    Labels are int64: (B,) class numbers, or (B, height, width) masks; masks that differ in size remain a list. Those
    of floating point, such as several classes of an image, stay as they are.

    Example:

    ```python
    batch = collate_images([dataset[0], dataset[1]])  # {"pixel_values": (2, channels, height, width), "labels": (2,)}
    ```
    """
    batch: dict[str, Any] = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    if "labels" in examples[0]:
        labels = [torch.as_tensor(example["labels"]) for example in examples]
        labels = [label if label.is_floating_point() else label.long() for label in labels]
        same_size = len({label.shape for label in labels}) == 1
        batch["labels"] = torch.stack(labels) if same_size else labels
    return batch
