"""Which images a run sees, and the datasets built from that."""

from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PretrainedConfig

from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import UsageError
from modeling_adala.families import native_size

from .data import ImageDataset, StreamingImageDataset, collate_images
from .sources import HFDataset, class_names, has_class_numbers, load_images
from .transforms import ImageTransform, check_image_size, parse_size


@dataclass
class DataConfig:
    """Where images come from and how they are cut.

    Args:
        dataset (`str` or a `datasets` object): Hub id, folder of images, folder of parquet files, parquet file, or
            `"mnist-digits"`.
        train_split (`str`, *optional*, defaults to `"train"`): Slices such as `"train[:500]"` work.
        eval_split (`str`, *optional*): Default: `"test"` or else `"validation"`, whichever exists.
        image_column (`str`, *optional*, defaults to `"image"`)
        label_column (`str`, *optional*, defaults to `"label"`): Used where it exists; stage 3 requires it.
        streaming (`bool`, *optional*, defaults to `False`): Read while training.
        image_size (`int` or `str`, *optional*): Side in pixels, a multiple of the patch, or `"336x448"` for height x
            width. Default: the teacher's.
        crop_scale (`float`, *optional*, defaults to 0.5): Smallest share of the image that a training crop covers.
        horizontal_flip (`float`, *optional*, defaults to 0.5): Probability of a flip in training. At 0, with
            `crop_scale` at 1, nothing is left to chance, and training images are cut as those of the evaluation.
    """

    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, folder of images or parquet files, or mnist-digits."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices work, as in train[:500]."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on. Default: test/validation."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels, where there are any."})
    streaming: bool = field(default=False, metadata={"help": "Read the training images while training."})
    # in this order: HfArgumentParser reads the second type of a union as that of the option
    image_size: int | str | None = field(
        default=None, metadata={"help": "Side in pixels, or HEIGHTxWIDTH. Default: the teacher's."}
    )
    crop_scale: float = field(default=0.5, metadata={"help": "Smallest share of the image in a training crop."})
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip in training."})

    def __post_init__(self):
        if self.dataset is None:
            raise UsageError("dataset is missing; pass a Hub id, a folder, a parquet file, or 'mnist-digits'.")
        if self.image_size is not None:
            size = parse_size("image_size", self.image_size)
            self.image_size = size if isinstance(size, int) else self.image_size
        if not 0 < self.crop_scale <= 1:
            raise UsageError(f"crop_scale={self.crop_scale} must be above 0 and at most 1.")
        if not 0 <= self.horizontal_flip <= 1:
            raise UsageError(f"horizontal_flip={self.horizontal_flip} is no probability; pass 0 to 1.")


class DataModule:
    """The datasets of a run: training with augmentation, evaluation without.

    Args:
        config (`DataConfig`): What to read.
        model_config (`PretrainedConfig`): Patch size, channels and native image size of the model.
        image_processor (*optional*): Normalization. Default: pixels in 0..1.
        require_labels (`bool`): Whether missing labels are an error.

    Raises:
        UsageError: for a missing column or split, or an image size that does not fit the patch.
        DataError: for unreadable or empty data.
    """

    def __init__(
        self,
        config: DataConfig,
        model_config: PretrainedConfig,
        image_processor: Any | None = None,
        require_labels: bool = False,
    ):
        self.config, model_config = config, vision_config(model_config)
        size = native_size(model_config) if config.image_size is None else parse_size("image_size", config.image_size)
        self.image_size = check_image_size(size, model_config.patch_size)
        self.columns: dict[str, Any] = {"image_column": config.image_column, "label_column": config.label_column}
        self.raw_train = load_images(
            config.dataset,
            config.train_split,
            streaming=config.streaming,
            require_labels=require_labels,
            **self.columns,
        )
        self.raw_eval = self._load_eval(require_labels)
        self.train_transform, self.eval_transform = self._transforms(image_processor, model_config.num_channels)

    @property
    def labels(self) -> list[str] | None:
        """Class names, or `None` where the data have no labels."""
        if self._label_column(self.raw_train) is None:
            return None
        return class_names(self.raw_train, self.config.label_column)

    @property
    def num_eval_images(self) -> int:
        """Images in the evaluation split, 0 without one."""
        return 0 if self.raw_eval is None else len(self.raw_eval)

    def train_dataset(self, seed: int) -> ImageDataset | StreamingImageDataset:
        return self._dataset(self.raw_train, self.train_transform, seed=seed)

    def eval_dataset(self, limit: int | None = None) -> Dataset | None:
        """Evaluation images, or `limit` of them, spread over the split; `None` where there is no split for it."""
        return None if self.raw_eval is None else self._without_augmentation(self.raw_eval, limit)

    def bank_dataset(self, limit: int | None = None) -> Dataset | None:
        """Training images without augmentation, for k-NN and probes, spread over the whole split."""
        if not isinstance(self.raw_train, datasets.Dataset):
            return None
        return self._without_augmentation(self.raw_train, limit)

    def loader(self, dataset: Dataset | None, batch_size: int = 64) -> DataLoader | None:
        if dataset is None:
            return None
        return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_images)

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

    def _dataset(self, raw: HFDataset, transform: Any, **kwargs: Any) -> Any:
        kind = ImageDataset if isinstance(raw, datasets.Dataset) else StreamingImageDataset
        return kind(raw, transform, **self._columns_of(raw), **kwargs)

    def _without_augmentation(self, raw: datasets.Dataset, limit: int | None) -> Dataset:
        dataset = self._dataset(raw, self.eval_transform)
        if limit is None or limit >= len(dataset):
            return dataset
        # many datasets are sorted by class
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:limit].sort().values
        return Subset(dataset, chosen.tolist())

    def _load_eval(self, require_labels: bool) -> datasets.Dataset | None:
        config, columns = self.config, self.columns
        if config.eval_split is not None:
            return load_images(config.dataset, config.eval_split, require_labels=require_labels, **columns)
        for split in ("test", "validation"):
            try:
                return load_images(config.dataset, split, require_labels=require_labels, **columns)
            except UsageError:
                continue
        return None

    def _label_column(self, raw: Any) -> str | None:
        return self.config.label_column if has_class_numbers(raw, self.config.label_column) else None

    def _columns_of(self, raw: Any) -> dict[str, Any]:
        return {"image_column": self.config.image_column, "label_column": self._label_column(raw)}
