"""Settings of the images of a run, and the datasets built from them."""

import logging
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PretrainedConfig

from modeling_adala.configuration_adala import pair, vision_config
from modeling_adala.errors import DataError, UsageError
from modeling_adala.inspection.towers import native_size

from ..runs.settings import Interval, check_settings
from .image_dataset import ImageDataset, StreamingImageDataset, collate_images
from .labels import SplitLabels, has_class_numbers
from .sources import HFDataset, image_files, load_images, open_splits, read_to_cache
from .transforms import ImageTransform, check_image_size, parse_size

logger = logging.getLogger(__name__)

# of all images of an evaluation batch: 64 images of 224 pixels in patches of 14, or 3 of 1,024
TOKENS_PER_BATCH = 16_384
LARGEST_BATCH = 64
_RANGES = {
    "shuffle_buffer": Interval(1),
    "crop_scale": Interval(0, 1, above=True),
    "horizontal_flip": Interval(0, 1),
    "eval_batch_size": Interval(1),
    "max_broken_fraction": Interval(0, 1),
}


@dataclass
class DataConfig:
    """Settings of the images: their source, splits, size and augmentation.

    Args:
        dataset (`str` or a `datasets` object): Hub id, folder of images, folder of parquet files, parquet file, or
            `"mnist-digits"`.
        train_split (`str`, *optional*, defaults to `"train"`): Slices such as `"train[:500]"` work.
        eval_split (`str`, *optional*): Default: `"test"` or else `"validation"`, the first that exists and has labels;
            without labels in either, the first that exists.
        image_column (`str`, *optional*, defaults to `"image"`)
        label_column (`str`, *optional*, defaults to `"label"`): Used where it exists; stage 3 requires it.
        streaming (`bool`, *optional*, defaults to `False`): Read while training, over and over until `max_steps`,
            which must be set. A killed run skips what it has seen by reading it again, and ends with the weights of
            an uninterrupted one. There is no k-NN and no linear probe, which learn from a sample of all images.
        shuffle_buffer (`int`, *optional*, defaults to 1000): Streaming: files that each worker holds in memory to draw
            the next image from. Shards (parquet files, their row groups) come in random order, several at a time; a
            dataset that is sorted by class in few shards needs a buffer as large as a few classes.
        image_size (`int` or `str`, *optional*): Side in pixels, a multiple of the patch, or `"336x448"` for height x
            width. Default: the teacher's.
        crop_scale (`float`, *optional*, defaults to 0.5): Smallest share of the image that a training crop covers.
        horizontal_flip (`float`, *optional*, defaults to 0.5): Probability of a flip in training. At 0, with
            `crop_scale` at 1, nothing is left to chance, and training images are cut as those of the evaluation.
        eval_batch_size (`int`, *optional*): Images that are evaluated at a time. Default: 64, or fewer of large
            images: as many as make 16,384 patches.
        max_broken_fraction (`float`, *optional*, defaults to 0.01): Share of images that may be unreadable. They are
            skipped, counted and named; more of them end the run.
        allow_external_images (`bool`, *optional*, defaults to `False`): Also open images that rows name by a URL, or
            by a path outside of the dataset's own folder. Data of others could otherwise make this machine open any
            file and call any server.

    Example:

    ```python
    config = DataConfig(dataset="mnist-digits", image_size=28)  # or a Hub id, a folder of images, parquet files
    ```
    """

    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, folder of images or parquet files, or mnist-digits."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices work, as in train[:500]."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on. Default: test/validation."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels, where there are any."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the training images while training; needs max_steps."}
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "Streaming: files held in memory by each worker to draw the next image from."},
    )
    # in this order: HfArgumentParser reads the second type of a union as that of the option
    image_size: int | str | None = field(
        default=None, metadata={"help": "Side in pixels, or HEIGHTxWIDTH. Default: the teacher's."}
    )
    crop_scale: float = field(
        default=0.5,
        metadata={"help": "Smallest share of the image in a training crop."},
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})
    eval_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images evaluated at a time. Default: 64, fewer if they are large."},
    )
    max_broken_fraction: float = field(
        default=0.01,
        metadata={"help": "Share of images that may be unreadable and are skipped, 0 to 1."},
    )
    allow_external_images: bool = field(
        default=False, metadata={"help": "Open URLs, and paths outside of the dataset's folder, that rows name."}
    )

    def __post_init__(self):
        check_settings(self, _RANGES)
        if self.dataset is None:
            raise UsageError("dataset is missing; pass a Hub id, a folder, a parquet file, or 'mnist-digits'.")
        if self.image_size is not None:
            size = parse_size("image_size", self.image_size)
            self.image_size = size if isinstance(size, int) else self.image_size


def check_streaming(config: DataConfig, max_steps: int) -> None:
    """Raise `UsageError` for a stream without `max_steps`: it has no length that epochs could be counted in."""
    if config.streaming and max_steps < 1:
        raise UsageError(f"max_steps={max_steps} with streaming=True: a stream has no epochs; pass max_steps.")


class DataModule:
    """Datasets of a run: training images with augmentation, evaluation images without.

    Args:
        config (`DataConfig`): What to read.
        model_config (`PretrainedConfig`): Patch size, channels and native image size of the model.
        image_processor (*optional*): Normalization. Default: pixels in 0..1.
        require_labels (`bool`): Whether missing labels are an error. If not, a split whose labels do not fit counts as
            one without labels, with a warning.

    Raises:
        UsageError: For a missing column or split, or an image size that does not fit the patch.
        DataError: For unreadable or empty data, and with `require_labels` for labels that are missing, negative, far
            larger than the number of rows, or in the evaluation split only. All labels are read here, before any time
            is spent; those of a stream are checked as they come.

    Example:

    ```python
    data = DataModule(DataConfig(dataset="mnist-digits", image_size=28), teacher.config, image_processor)
    train_dataset, eval_dataset = data.train_dataset(seed=0), data.eval_dataset()
    ```
    """

    def __init__(
        self,
        config: DataConfig,
        model_config: PretrainedConfig,
        image_processor: Any | None = None,
        require_labels: bool = False,
    ):
        self.config, self.model_config = config, vision_config(model_config)
        size = native_size(model_config) if config.image_size is None else parse_size("image_size", config.image_size)
        self.image_size = check_image_size(size, model_config.patch_size)
        self.columns: dict[str, Any] = {"image_column": config.image_column, "label_column": config.label_column}
        splits = open_splits(config.dataset, config.streaming)
        self.files = image_files(config.dataset, config.allow_external_images)
        options = {"require_labels": require_labels, **self.columns}
        self._read: dict[int, tuple[HFDataset, SplitLabels | None]] = {}
        self.raw_train = load_images(splits, config.train_split, streaming=config.streaming, **options)
        self.require_labels = require_labels
        self.raw_eval = self._load_eval(splits, options)
        self._labels: list[str] | None = None
        self._train_ids = self._label_ids(self.raw_train)
        self._eval_ids = None if self.raw_eval is None else self._label_ids(self.raw_eval)
        self._read.clear()
        self.train_transform, self.eval_transform = self._transforms(image_processor, model_config.num_channels)

    @property
    def labels(self) -> list[str] | None:
        """Class names of the training images, or else of the evaluation images; `None` where neither have labels."""
        return self._labels

    @property
    def has_training_labels(self) -> bool:
        """Return whether all training images have a label."""
        return self._train_ids is not None

    @property
    def has_masks(self) -> bool:
        """Return whether the label column holds images, as masks for segmentation are stored."""
        features, column = self.raw_train.features, self.config.label_column
        return column != self.config.image_column and isinstance((features or {}).get(column), datasets.Image)

    @property
    def eval_batch_size(self) -> int:
        """Images evaluated at a time: that of the config, or as many as the bound on their patches allows."""
        if self.config.eval_batch_size is not None:
            return self.config.eval_batch_size
        height, width = (
            side // p for side, p in zip(self.image_size, pair(self.model_config.patch_size), strict=True)
        )
        return min(max(TOKENS_PER_BATCH // (height * width), 1), LARGEST_BATCH)

    @property
    def num_eval_images(self) -> int:
        """Return the number of images in the evaluation split, 0 without one."""
        return 0 if self.raw_eval is None else len(self.raw_eval)

    def train_dataset(self, seed: int) -> ImageDataset | StreamingImageDataset:
        """Return the training images, with labels if these are required; a stream starts over when it ends."""
        kwargs: dict[str, Any] = {"label_ids": self._train_ids if self.require_labels else None, "seed": seed}
        if not isinstance(self.raw_train, datasets.Dataset):
            kwargs |= {"shuffle_buffer": self.config.shuffle_buffer, "repeat": True}
        return self._dataset(self.raw_train, self.train_transform, **kwargs)

    def eval_dataset(self, limit: int | None = None) -> Dataset | None:
        """Return the evaluation images, or `limit` of them, spread over the split; `None` without such a split."""
        if self.raw_eval is None:
            return None
        return self._without_augmentation(self.raw_eval, limit, label_ids=self._eval_ids)

    def bank_dataset(self, limit: int | None = None) -> Dataset | None:
        """Return training images without augmentation, spread over the split, for k-NN; `None` for a stream."""
        if not isinstance(self.raw_train, datasets.Dataset):
            return None
        return self._without_augmentation(self.raw_train, limit, label_ids=self._train_ids)

    def loader(self, dataset: Dataset | None, batch_size: int | None = None) -> DataLoader | None:
        """Return a loader with batches of `batch_size`, by default `eval_batch_size`; `None` without a dataset."""
        if dataset is None:
            return None
        return DataLoader(dataset, batch_size=batch_size or self.eval_batch_size, collate_fn=collate_images)

    def _transforms(self, image_processor: Any | None, channels: int) -> tuple[Any, Any]:
        train = ImageTransform.from_processor(
            image_processor,
            self.image_size,
            channels,
            train=self.config.crop_scale < 1 or self.config.horizontal_flip > 0,
            crop_scale=(self.config.crop_scale, 1.0),
            horizontal_flip=self.config.horizontal_flip,
        )
        return train, ImageTransform.from_processor(image_processor, self.image_size, channels, train=False)

    @property
    def _reading(self) -> dict[str, Any]:
        limit = self.config.max_broken_fraction
        return {"image_column": self.config.image_column, "max_broken_fraction": limit, "files": self.files}

    def _dataset(self, raw: HFDataset, transform: Any, **kwargs: Any) -> Any:
        kind = ImageDataset if isinstance(raw, datasets.Dataset) else StreamingImageDataset
        column = None if kwargs.get("label_ids") is None else self.config.label_column
        return kind(raw, transform, label_column=column, **self._reading, **kwargs)

    def _without_augmentation(self, raw: datasets.Dataset, limit: int | None, **kwargs: Any) -> Dataset:
        dataset = self._dataset(raw, self.eval_transform, **kwargs)
        if limit is None or limit >= len(dataset):
            return dataset
        # many datasets are sorted by class
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:limit].sort().values
        return Subset(dataset, chosen.tolist())

    def _load_eval(self, splits: dict[str, HFDataset], options: dict[str, Any]) -> datasets.Dataset | None:
        source, chosen = self.config.dataset, self.config.eval_split
        unlabeled: dict[str, HFDataset] = {}
        if chosen is not None:
            name = chosen.partition("[")[0]
            if name != chosen and name in splits:  # a stream cannot be sliced
                splits = {name: read_to_cache(splits[name], source)}
            return read_to_cache(load_images(splits, chosen, **options), source)
        for split in ("test", "validation"):
            if split not in splits:
                continue
            try:
                raw = load_images(splits, split, **options)
            except UsageError:
                continue
            if self._is_labeled(raw):
                if unlabeled:
                    logger.warning("split 'test' has no labels: evaluating on %r", split)
                return read_to_cache(raw, source)
            unlabeled[split] = raw
        if self.require_labels and unlabeled:
            logger.warning("no evaluation: split %s has no labels", " and ".join(map(repr, unlabeled)))
        if self.require_labels or not unlabeled:
            return None
        return read_to_cache(next(iter(unlabeled.values())), source)

    def _is_labeled(self, raw: HFDataset) -> bool:
        labels = self._split_labels(raw)
        return labels is not None and labels.is_labeled

    def _split_labels(self, raw: HFDataset) -> SplitLabels | None:
        """Return what the label column of a split holds, read once; `None` where it holds no class numbers."""
        if id(raw) not in self._read:
            column = self.config.label_column
            self._read[id(raw)] = raw, SplitLabels.read(raw, column) if has_class_numbers(raw, column) else None
        return self._read[id(raw)][1]

    def _label_ids(self, raw: HFDataset) -> list[int] | None:
        """Return the index among the classes of each class number of a split; `None` without usable labels.

        The first split with labels says which classes there are.
        """
        labels = self._split_labels(raw)
        if labels is None:
            return None
        try:
            classes = labels.classes() if self._labels is None else self._labels
            ids = labels.ids(classes)
        except (DataError, UsageError) as error:
            if self.require_labels:
                raise
            logger.warning("%s These labels are left out: no k-NN, linear probe or head accuracy.", error)
            return None
        self._labels = classes
        return ids
