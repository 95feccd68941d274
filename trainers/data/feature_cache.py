"""The teacher's features on disk, for a stage 2 that sees the same images in every epoch.

One folder per teacher, data, transform and choice of features: another of any of these is another folder, so that what
is found always fits. In it, `features.npy` of shape `(images, states, tokens, hidden_size)`, which is memory-mapped,
`pixels.npy` with a checksum of each image as the teacher saw it, and `cache.json` with what the folder's name stands
for. The folder takes its name once all is written: a build that was killed starts again.
"""

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modeling_adala.errors import DataError, UsageError

from ..runs.checkpoints import whole_directory
from .image_dataset import ImageDataset
from .sources import fingerprint
from .transforms import ImageTransform

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16")
FEATURES = "teacher_features"


def cache_key(dataset: Any, **facts: Any) -> dict[str, Any]:
    """Return all that a cache depends on: the images, their transform, and `facts` about the teacher.

    Raises:
        UsageError: For data that cannot be told apart, or that differ from epoch to epoch.
    """
    transform: Any = getattr(dataset, "transform", None)
    if not isinstance(dataset, ImageDataset) or not isinstance(transform, ImageTransform):
        raise UsageError(
            f"teacher_feature_cache: a {type(dataset).__name__} as train_dataset cannot be recognized in a later run;"
            " pass an ImageDataset with an ImageTransform, or leave the cache out."
        )
    if transform.train:
        raise UsageError(
            "teacher_feature_cache: the training images are cropped or flipped at random, another way in every epoch;"
            " set crop_scale=1 and horizontal_flip=0, or leave the cache out."
        )
    return {
        "images": len(dataset),
        "data": fingerprint(dataset.dataset),
        "transform": transform.settings(),
        **facts,
    }


def check_folder(path: str | Path) -> None:
    """Raise `UsageError` for a path that cannot be a folder, such as a file."""
    above = Path(path)
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise UsageError(f"teacher_feature_cache={str(path)!r}: {str(above)!r} is a file; pass a folder.")


def open_cache(path: str | Path, key: dict[str, Any]) -> Path | None:
    """Return the folder of a finished cache, or `None`."""
    folder = _folder(path, key)
    return folder if (folder / "cache.json").is_file() else None


def build_cache(path: str | Path, key: dict[str, Any], batches: Iterable[tuple[Tensor, Tensor]], dtype: str) -> Path:
    """Write a cache and return its folder.

    Args:
        path (`str` or `Path`): Folder of all caches.
        key (`dict`): See `cache_key`.
        batches (`Iterable`): Pixels `(batch, channels, height, width)` and features `(batch, states, tokens,
            hidden_size)` of all images, in order.
        dtype (`str`): One of `DTYPES`.

    Returns:
        `Path`: the folder of this cache.

    Raises:
        UsageError: Where they do not fit on the disk, or into float16.
        CheckpointError: If they cannot be written.
    """
    folder = _folder(path, key)
    checksums: list[int] = []
    with whole_directory(folder) as staging:
        with (staging / "features.npy").open("wb") as file:
            for pixel_values, features in batches:
                rows = features.cpu().to(getattr(torch, dtype))
                if not checksums:
                    _start_file(file, folder, (key["images"], *rows.shape[1:]), np.dtype(dtype))
                if dtype == "float16" and not rows.isfinite().all():
                    raise UsageError("teacher_feature_cache_dtype='float16': a feature exceeds 65,504; use 'float32'.")
                file.write(rows.contiguous().numpy().tobytes())
                checksums += [_checksum(pixels) for pixels in pixel_values.cpu()]
        np.save(staging / "pixels.npy", np.array(checksums, dtype=np.uint32))
        (staging / "cache.json").write_text(json.dumps(key, indent=2) + "\n")
    return folder


class WithTeacherFeatures(Dataset):
    """Dataset whose examples also hold the cached features of their image, once `folder` is set.

    Raises:
        DataError: (from indexing) for an image that is not the one that the teacher saw.
    """

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset
        self.folder: Path | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.dataset[index]
        if self.folder is None:
            return example
        # opened here, because a worker process may get a copy of this object: a mapping would travel as its content
        checksums = np.lib.format.open_memmap(self.folder / "pixels.npy", mode="r")
        if checksums[index] != _checksum(example["pixel_values"]):
            raise DataError(
                f"teacher_feature_cache: row {index} is not the image that {self.folder} was made from; remove that"
                " folder to make it anew."
            )
        features = np.lib.format.open_memmap(self.folder / "features.npy", mode="r")
        return example | {FEATURES: torch.from_numpy(np.array(features[index]))}

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def summary(self) -> str:
        return self.dataset.summary()


class CollateWithFeatures:
    """Collator that also stacks cached features, `(batch, states, tokens, hidden_size)`, where there are any."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if FEATURES not in examples[0]:
            return self.collate(examples)
        others = [{name: value for name, value in example.items() if name != FEATURES} for example in examples]
        return self.collate(others) | {FEATURES: torch.stack([example[FEATURES] for example in examples])}


def _folder(path: str | Path, key: dict[str, Any]) -> Path:
    return Path(path) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _start_file(file: BinaryIO, folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    needed, free = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UsageError(
            f"teacher_feature_cache={str(folder.parent)!r}: the features take {needed / 1e9:,.2f} GB, and"
            f" {free / 1e9:,.2f} GB are free; pass another folder or teacher_feature_cache_dtype='float16'."
        )
    logger.info("teacher features: %.2f GB to write into %s", needed / 1e9, folder)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _checksum(pixels: Tensor) -> int:
    return zlib.crc32(pixels.contiguous().numpy().tobytes())
