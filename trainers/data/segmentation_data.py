"""Datasets for semantic segmentation: images, masks of class numbers, class names."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import DataError, UsageError

from .data_config import DataConfig, DataModule
from .image_dataset import ImageDataset, ImageReader, RowError, StreamingImageDataset
from .image_files import LOCAL_FILES, ImageFiles, Unreadable, blaming, first_line, open_image
from .sources import HFDataset, columns_of
from .transforms import SegmentationTransform, check_image_size

IGNORE_INDEX = 255

_INTEGER_MODES = ("1", "L", "P", "I")
_CROP_RATIO = (3 / 4, 4 / 3)
_CHECKED_MASKS = 200


def read_mask(
    value: Any,
    name: str,
    num_labels: int | None = None,
    reduce_labels: bool = False,
    files: ImageFiles = LOCAL_FILES,
) -> np.ndarray:
    """Return the mask of a row.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str`, `dict` or array): An image (of a palette, its indices), its file as
            bytes, path or both, or integers (height, width).
        name (`str`): Name of the row, for errors.
        num_labels (`int`, *optional*): Number of classes. Default: any label below `IGNORE_INDEX`.
        reduce_labels (`bool`, *optional*, defaults to `False`): Label 0 becomes `IGNORE_INDEX`, and all others count
            from 0, as ADE20K needs it.
        files (`ImageFiles`, *optional*): Files that the row may name, see `sources.image_files`.

    Returns:
        `np.ndarray`: Integers (height, width), 0 to `num_labels - 1` or `IGNORE_INDEX`.

    Raises:
        Unreadable: If the file does not decode, or may not be opened.
        RowError: If there is no mask, or it holds no class numbers, or a number without a class; a `DataError`.
    """
    if value is None:
        raise RowError(f"the mask of {name} is empty; remove the row or label it.")
    if isinstance(value, list | np.ndarray):
        mask = np.asarray(value)
    else:
        image = _decode_mask(value, files)
        if not image.mode.startswith(_INTEGER_MODES):
            raise RowError(f"the mask of {name} has colors (mode {image.mode}); store class numbers, as a gray PNG.")
        mask = np.asarray(image)
    if mask.ndim != 2 or mask.dtype.kind not in "iub":
        raise RowError(
            f"the mask of {name} has shape {mask.shape} and type {mask.dtype}; store integers (height, width)."
        )
    mask = mask.astype(np.int64)
    if reduce_labels:
        mask = np.where((mask == 0) | (mask == IGNORE_INDEX), IGNORE_INDEX, mask - 1)
    count = IGNORE_INDEX if num_labels is None else num_labels
    wrong = np.unique(mask[(mask != IGNORE_INDEX) & ((mask < 0) | (mask >= count))])
    if wrong.size:
        remedy = "store class numbers" if num_labels is None else "name all classes with --labels"
        raise RowError(
            f"the mask of {name} holds label {wrong[0]}, but the classes are 0 to {count - 1}"
            f" and {IGNORE_INDEX} for none: {remedy}, or repair the mask."
        )
    return mask


def _decode_mask(value: Any, files: ImageFiles) -> Image.Image:
    try:
        image = open_image(value, None, files)
        image.load()
    except Exception as error:
        raise Unreadable(f"mask: {first_line(error)}") from error
    return image


class _MaskReader(ImageReader):
    """Base of the datasets whose rows hold an image and a mask."""

    transform: Any  # a `SegmentationTransform`

    def __init__(
        self,
        dataset: Any,
        transform: Any,
        *,
        num_labels: int,
        reduce_labels: bool = False,
        label_column: str = "label",
        **kwargs: Any,
    ) -> None:
        self.num_labels, self.reduce_labels = num_labels, reduce_labels
        super().__init__(dataset, transform, label_column=label_column, **kwargs)

    def _with_labels(self, dataset: HFDataset, column: str) -> HFDataset:
        return undecoded_masks(dataset, column)

    def _example(self, row: dict[str, Any], key: int, name: str) -> dict[str, Any]:
        mask = read_mask(self._label(row, name), name, self.num_labels, self.reduce_labels, self.files)
        value = row[self.image_column]
        with blaming(value, self.files):
            image = open_image(value, None, self.files)
            if image.size != mask.shape[::-1]:
                raise RowError(
                    f"in {name} the image has {image.width}x{image.height} pixels but the mask"
                    f" {mask.shape[1]}x{mask.shape[0]}; store them in one size."
                )
            pixels, labels = self.transform(image, mask, self._rng(key))
        return {"pixel_values": pixels, "labels": labels}


class SegmentationDataset(_MaskReader, ImageDataset):
    """Map-style dataset of examples `{"pixel_values": float (C, H, W), "labels": int64 (H, W)}`.

    A row whose image or mask does not decode is skipped as there.

    Args:
        dataset (`datasets.Dataset`): Rows with an image and a mask.
        transform (`SegmentationTransform`): Called with an image and its mask.
        num_labels (`int`): Number of classes.
        reduce_labels (`bool`, *optional*, defaults to `False`): See `read_mask`.
        label_column (`str`, *optional*, defaults to `"label"`): Column of the masks.
        kwargs: As for `ImageDataset`.

    Raises:
        UsageError: If a column is missing or holds no masks.
        RowError: On indexing, for a mask that is missing, differs from its image in size, or has a label without a
            class; a `DataError`.
        BrokenImagesError: On indexing, if too many rows are broken; a `DataError`.
    """


class StreamingSegmentationDataset(_MaskReader, StreamingImageDataset):
    """Stream of the examples of `SegmentationDataset`, with the arguments of it and of `StreamingImageDataset`."""


def undecoded_masks(dataset: HFDataset, column: str) -> HFDataset:
    """Return the dataset with its masks undecoded; raises `UsageError` for a column of class numbers."""
    if dataset.features is None:
        return dataset
    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, datasets.Value | datasets.ClassLabel) and feature.dtype not in ("string", "binary"):
        raise UsageError(
            f"label_column={column!r} holds {feature}, not masks; name another of {', '.join(dataset.features)}, or"
            " use --task image-classification."
        )
    return dataset


def read_labels(text: str) -> list[str]:
    """Return the class names in the order of their numbers, from `a,b,c` or a JSON file.

    The file holds a list of names, or a mapping from number to name like the `id2label.json` of datasets on the Hub.

    Raises:
        UsageError: If the file cannot be read, numbers are left out, or a name comes twice.
    """
    names: Any = [name.strip() for name in text.split(",")]
    if text.endswith(".json"):
        try:
            names = json.loads(Path(text).expanduser().read_text())
            if isinstance(names, dict):
                names = [names[str(number)] for number in range(len(names))]
        except KeyError as error:
            raise UsageError(f"labels={text!r} has no class {error}; number them from 0, without gaps.") from error
        except (OSError, ValueError) as error:
            raise UsageError(f"labels={text!r} could not be read: {first_line(error)}.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"labels={text!r}; give names such as sky,road,car, or a JSON list of names.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"labels={text!r} names {twice[0]!r} twice.")
    return names


class SegmentationData(DataModule):
    """Datasets of a segmentation run: images with masks, augmented for training.

    Args:
        config (`DataConfig`): What to read; `label_column` holds the masks, `image_size` is what whole images are
            resized to for evaluation.
        model_config (`PretrainedConfig`): As for `DataModule`.
        image_processor (*optional*): As for `DataModule`.
        labels (`list[str]`, *optional*): Class names. Default: those of the dataset's features, or else as many
            numbers as the masks hold.
        reduce_labels (`bool`, *optional*, defaults to `False`): See `read_mask`.
        window (`tuple[int, int]`, *optional*): Part (height, width) of the resized image that the model sees at a time
            at evaluation, and the size of training crops, which then cover as much less of the image. Default: all.

    Raises:
        UsageError: For a missing column or split, a size that does not fit the patch or the image.
        DataError: For unreadable or empty data, or masks that do not fit the classes: all masks are looked at if there
            are no names, 200 of each split if there are.
    """

    def __init__(
        self,
        config: DataConfig,
        model_config: PretrainedConfig,
        image_processor: Any | None = None,
        *,
        labels: list[str] | None = None,
        reduce_labels: bool = False,
        window: tuple[int, int] | None = None,
    ):
        self.window, self.reduce_labels = window, reduce_labels
        if window is not None:
            check_image_size(window, vision_config(model_config).patch_size)
        super().__init__(config, model_config, image_processor)
        if labels is not None and len(labels) > IGNORE_INDEX:
            raise UsageError(
                f"labels names {len(labels):,} classes, but masks can hold {IGNORE_INDEX} at most, as {IGNORE_INDEX}"
                " stands for none."
            )
        for raw in self._splits():
            if config.label_column not in columns_of(raw):
                raise UsageError(
                    f"label_column={config.label_column!r} does not exist; name the column of the masks, one of"
                    f" {', '.join(columns_of(raw))}."
                )
        names = labels or _feature_names(self.raw_train, config.label_column)
        largest = self._check_masks(None if names is None else len(names))
        self._labels = names or [str(number) for number in range(largest + 1)]

    @property
    def labels(self) -> list[str]:
        """Class names."""
        return self._labels or []

    def _splits(self) -> Iterator[HFDataset]:
        yield self.raw_train
        if self.raw_eval is not None:
            yield self.raw_eval

    def _check_masks(self, num_labels: int | None) -> int:
        largest = -1
        for raw in self._splits():
            if not isinstance(raw, datasets.Dataset):
                if num_labels is None:
                    raise UsageError("labels=None with streaming; name the classes with --labels.")
                continue
            column = self.config.label_column
            masks = undecoded_masks(raw, column).select_columns(column)
            step = 1 if num_labels is None else -(-len(masks) // _CHECKED_MASKS)
            for row in tqdm(range(0, len(masks), step), desc="checking masks", leave=False, disable=None):
                with suppress(Unreadable):  # reading the row will report it
                    mask = read_mask(masks[row][column], f"row {row}", num_labels, self.reduce_labels, self.files)
                    largest = max(largest, int(mask[mask != IGNORE_INDEX].max(initial=-1)))
        if num_labels is None and largest < 0:
            raise DataError(f"label_column={self.config.label_column!r} holds no class at all; check the masks.")
        return largest

    def _transforms(self, image_processor: Any | None, channels: int) -> tuple[Any, Any]:
        (height, width), crop = self.image_size, self.window or self.image_size
        if crop[0] > height or crop[1] > width:
            raise UsageError(
                f"window={crop[0]}x{crop[1]} is larger than image_size={height}x{width}; make it smaller."
            )
        # a crop shows the image at the scale at which evaluation shows it, or larger
        share, aspect = (crop[0] * crop[1]) / (height * width), (crop[1] / crop[0]) / (width / height)
        train = SegmentationTransform.from_processor(
            image_processor,
            crop,
            channels,
            train=True,
            crop_scale=(self.config.crop_scale * share, share),
            crop_ratio=(_CROP_RATIO[0] * aspect, _CROP_RATIO[1] * aspect),
            horizontal_flip=self.config.horizontal_flip,
        )
        return train, SegmentationTransform.from_processor(image_processor, self.image_size, channels)

    def _dataset(self, raw: HFDataset, transform: Any, **kwargs: Any) -> Any:
        kind = SegmentationDataset if isinstance(raw, datasets.Dataset) else StreamingSegmentationDataset
        kwargs |= {"num_labels": len(self.labels), "reduce_labels": self.reduce_labels, **self._reading}
        return kind(raw, transform, label_column=self.config.label_column, **kwargs)

    def _is_labeled(self, raw: HFDataset) -> bool:
        column = self.config.label_column
        if not isinstance(raw, datasets.Dataset) or column not in columns_of(raw):
            return True  # that there are no masks is an error, told later
        masks = undecoded_masks(raw, column).select_columns(column)
        return any(row[column] is not None for row in masks)

    def _load_eval(self, splits: dict[str, HFDataset], options: dict[str, Any]) -> datasets.Dataset | None:
        raw = super()._load_eval(splits, options)
        return raw if raw is None or self.config.eval_split is not None or self._is_labeled(raw) else None

    def _label_ids(self, raw: HFDataset) -> None:
        """Return `None`: masks have more than one number per image."""


def _feature_names(dataset: HFDataset, column: str) -> list[str] | None:
    """Return the class names of a column of arrays of `ClassLabel`."""
    feature: Any = dataset.features[column] if dataset.features is not None else None
    while hasattr(feature, "feature"):
        feature = feature.feature
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
