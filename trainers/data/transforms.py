"""Transforms of PIL images to model inputs, whose only source of randomness is a NumPy generator.

Torchvision is not needed: the crop and the resize are one call to Pillow, which antialiases.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from modeling_adala.configuration_adala import pair
from modeling_adala.errors import UsageError

MAX_SIDE = 16_384  # a single image of this side is 3 GB of floats

_TRIES = 10
# Pillow may first shrink by whole factors, as long as what remains is at least this many times the output.
_REDUCING_GAP = 2.0
_MODES = {1: "L", 3: "RGB"}


def check_image_size(image_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return an image size as (height, width), and check that whole patches tile it.

    Args:
        image_size (`int` or `tuple[int, int]`): Side, or (height, width), in pixels.
        patch_size (`int` or `tuple[int, int]`): Side, or (height, width), in pixels.

    Raises:
        UsageError: If a side is not a positive multiple of the patch; the message names the nearest valid sizes.
    """
    size, patch = pair(parse_size("image_size", image_size)), pair(parse_size("patch_size", patch_size))
    if min(patch) < 1:
        raise UsageError(f"patch_size={patch_size!r} must be positive.")
    for side, step, name in zip(size, patch, ("height", "width"), strict=True):
        below = max(side, 0) // step * step
        if side < 1 or below != side:
            nearest = f"{below} or {below + step}" if below else f"{step}"
            raise UsageError(
                f"image_size={image_size!r}: the {name} {side} is not a positive multiple of the patch size {step}; "
                f"use {nearest}."
            )
    return size


def parse_size(name: str, value: Any) -> int | tuple[int, int]:
    """Return a size as written on the command line, in YAML or in Python.

    Args:
        name (`str`): Name of the setting, for the message.
        value (`int`, `str` or `tuple[int, int]`): `224`, `"224"`, or `"336x448"` or `(336, 448)` for height x width.

    Raises:
        UsageError: For anything else.
    """
    sides = value if isinstance(value, list | tuple) else str(value).lower().split("x")
    if len(sides) not in (1, 2) or not all(str(side).isdecimal() for side in sides):
        raise UsageError(
            f"{name}={value!r} is an invalid size; pass an integer such as 224, or HEIGHTxWIDTH such as 336x448."
        )
    if any(len(str(side)) > 5 or int(side) > MAX_SIDE for side in sides):
        raise UsageError(f"{name}={value!r} is more than {MAX_SIDE:,} pixels, which no memory holds; pass less.")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _channels(name: str, values: float | Sequence[float], num_channels: int) -> np.ndarray:
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if array.shape not in ((1,), (num_channels,)):
        raise UsageError(f"{name}={values!r} has {array.size} values for num_channels={num_channels}; give one each.")
    return np.broadcast_to(array, (num_channels,))


def _to_8_bit(image: Image.Image) -> Image.Image:
    # Pillow clips these modes to 0..255 instead of scaling them, which turns a 16-bit scan white.
    pixels: np.ndarray = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        pixels = pixels * 255 if pixels.min() >= 0 and pixels.max() <= 1 else pixels
    else:
        pixels = pixels / 257
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


class _Transform:
    """Base of the transforms with and without masks: turns a box of an image into a normalized tensor."""

    def __init__(
        self,
        image_size: int | tuple[int, int],
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        rescale_factor: float = 1 / 255,
        num_channels: int = 3,
        resample: int = 3,
        train: bool = False,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
    ) -> None:
        self.image_size = check_image_size(image_size, 1)
        if num_channels not in _MODES:
            raise UsageError(f"num_channels={num_channels!r} is not supported; use 3 (RGB) or 1 (grayscale).")
        if resample not in list(Image.Resampling):
            raise UsageError(
                f"resample={resample!r} is not a Pillow filter; use 2 (bilinear), 3 (bicubic) or 1 (Lanczos)."
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UsageError(f"crop_scale={crop_scale!r} must be two shares of the area with 0 < low <= high <= 1.")
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise UsageError(f"crop_ratio={crop_ratio!r} must be two aspect ratios with 0 < low <= high.")
        if not 0 <= horizontal_flip <= 1:
            raise UsageError(f"horizontal_flip={horizontal_flip!r} is not a probability; use a value of 0..1.")
        mean, std = _channels("image_mean", image_mean, num_channels), _channels("image_std", image_std, num_channels)
        if not (std > 0).all():
            raise UsageError(f"image_std={image_std!r} must be positive.")
        self.num_channels, self.resample, self.train = num_channels, int(resample), bool(train)
        self.crop_scale, self.crop_ratio = tuple(crop_scale), tuple(crop_ratio)
        self.horizontal_flip = horizontal_flip
        # Rescaling and normalization are one multiplication and one subtraction.
        self._factor = (rescale_factor / std).astype(np.float32)[:, None, None]
        self._offset = (mean / std).astype(np.float32)[:, None, None]

    @classmethod
    def from_processor(
        cls,
        image_processor: Any | None,
        image_size: int | tuple[int, int],
        num_channels: int = 3,
        train: bool = False,
        **overrides: Any,
    ) -> Self:
        """Return the transform that normalizes as an image processor of Transformers does.

        Args:
            image_processor (`BaseImageProcessor`, *optional*): Default: pixels of 0..1 without normalization.
            image_size (`int` or `tuple[int, int]`): Output side or (height, width); the processor's is not used.
            num_channels (`int`, *optional*, defaults to 3): 3 or 1; with 1, a mean and a standard deviation of three
                channels are averaged.
            train (`bool`, *optional*, defaults to `False`): Whether to augment.
            overrides: Arguments of the class that win over the processor's.

        Raises:
            UsageError: As the class does.
        """
        options: dict[str, Any] = {"image_mean": 0.0, "image_std": 1.0, "rescale_factor": 1 / 255}
        if image_processor is not None:
            if not getattr(image_processor, "do_rescale", True):
                options["rescale_factor"] = 1.0
            elif getattr(image_processor, "rescale_factor", None) is not None:
                options["rescale_factor"] = image_processor.rescale_factor
            if getattr(image_processor, "do_normalize", True):
                for name in ("image_mean", "image_std"):
                    value = getattr(image_processor, name, None)
                    if value is not None:
                        options[name] = float(np.mean(value)) if num_channels == 1 else value
            if getattr(image_processor, "resample", None) is not None:
                options["resample"] = int(image_processor.resample)
        return cls(image_size, **{**options, "num_channels": num_channels, "train": train, **overrides})

    def settings(self) -> dict[str, Any]:
        """Return all settings of the transform as plain values."""
        values = {name.removeprefix("_"): value for name, value in vars(self).items()}
        arrays = {name: value.tolist() for name, value in values.items() if isinstance(value, np.ndarray)}
        return {"kind": type(self).__name__, **values, **arrays}

    def _check_rng(self, rng: np.random.Generator | None) -> np.random.Generator:
        if rng is None:
            raise UsageError("rng=None with train=True; pass numpy.random.default_rng(seed), or use train=False.")
        return rng

    def _cut(self, image: Image.Image, box: tuple[float, float, float, float], flip: bool) -> torch.Tensor:
        mode = _MODES[self.num_channels]
        if image.mode == "F" or image.mode.startswith("I"):
            image = _to_8_bit(image)
        elif image.mode not in ("L", mode):
            # Palettes cannot be interpolated, and the other modes only coincide with this order.
            image = image.convert(mode)
        height, width = self.image_size
        gap = _REDUCING_GAP if self.train else None
        image = image.resize((width, height), self.resample, box=box, reducing_gap=gap)
        if image.mode != mode:
            image = image.convert(mode)
        pixels = np.asarray(image).reshape(height, width, self.num_channels)
        if flip:
            pixels = pixels[:, ::-1]
        output = np.empty((self.num_channels, height, width), dtype=np.float32)
        np.multiply(pixels.transpose(2, 0, 1), self._factor, out=output)
        output -= self._offset
        return torch.from_numpy(output)

    def _random_box(
        self, size: tuple[int, int], rng: np.random.Generator, aspect: float = 1.0
    ) -> tuple[int, int, int, int]:
        width, height = size
        low, high = (aspect * ratio for ratio in self.crop_ratio)
        for _ in range(_TRIES):
            area = width * height * rng.uniform(self.crop_scale[0], self.crop_scale[1])
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(rng.integers(0, width - crop_width + 1))
                top = int(rng.integers(0, height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
        crop_width = min(width, max(1, round(height * high)))
        crop_height = min(height, max(1, round(width / low)))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height


class ImageTransform(_Transform):
    """Transform of a PIL image of any mode and size to a float32 tensor `(channels, height, width)`.

    For evaluation (`train=False`), the largest centered crop of the output's aspect ratio is resized to `image_size`:
    the same as resizing the shortest edge and cropping the center. For training, a random crop (torchvision's
    `RandomResizedCrop`) is resized and flipped at random. Pixels are then multiplied by `rescale_factor` and
    normalized by channel. Alpha is dropped, as the image processors of Transformers do; 16-bit grayscale is scaled to
    8 bits.

    Args:
        image_size (`int` or `tuple[int, int]`): Output side or (height, width) in pixels.
        image_mean (`float` or `Sequence[float]`): One value, or one per channel, subtracted after rescaling.
        image_std (`float` or `Sequence[float]`): One value, or one per channel, divided by after that.
        rescale_factor (`float`, *optional*, defaults to 1/255): Factor for pixels of 0..255.
        num_channels (`int`, *optional*, defaults to 3): 3 for RGB or 1 for grayscale.
        resample (`int`, *optional*, defaults to 3): Pillow's number of a filter; 3 is bicubic.
        train (`bool`, *optional*, defaults to `False`): Whether to augment.
        crop_scale (`tuple[float, float]`, *optional*, defaults to `(0.5, 1.0)`): Range of the crop's share of area.
        crop_ratio (`tuple[float, float]`, *optional*, defaults to `(3/4, 4/3)`): Range of the crop's width / height.
        horizontal_flip (`float`, *optional*, defaults to 0.5): Probability of a flip.

    Raises:
        UsageError: If an argument is out of its range.
    """

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Transform one image.

        Args:
            image (`PIL.Image.Image`): An image of any mode and size.
            rng (`numpy.random.Generator`, *optional*): Source of the crop and the flip; required for training.

        Returns:
            `Tensor`: Float32 `(channels, height, width)`.
        """
        if not self.train:
            return self._cut(image, self._center_box(image.size), flip=False)
        rng = self._check_rng(rng)
        box = self._random_box(image.size, rng)
        return self._cut(image, box, flip=rng.random() < self.horizontal_flip)

    def draft_size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Return the smallest (width, height) at which a JPEG of `size` may be decoded without blurring any crop.

        None for evaluation, where every pixel counts.
        """
        if not self.train:
            return None
        (full_width, full_height), (height, width) = size, self.image_size
        low, high = self.crop_ratio
        side = math.sqrt(self.crop_scale[0] * full_width * full_height)
        # The last bound of each is the crop that a panorama gets when no random one fits.
        crop_width = min(side * math.sqrt(low), full_width, full_height * high)
        crop_height = min(side / math.sqrt(high), full_height, full_width / low)
        return (
            math.ceil(_REDUCING_GAP * width * full_width / crop_width),
            math.ceil(_REDUCING_GAP * height * full_height / crop_height),
        )

    def _center_box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        (width, height), (out_height, out_width) = size, self.image_size
        scale = max(out_width / width, out_height / height)
        crop_width, crop_height = min(width, out_width / scale), min(height, out_height / scale)
        left, top = (width - crop_width) / 2, (height - crop_height) / 2
        return left, top, min(width, left + crop_width), min(height, top + crop_height)


class SegmentationTransform(_Transform):
    """Transform of a PIL image and its mask to a float32 tensor and int64 labels, cut and flipped alike.

    For training, a random crop is resized to `image_size` (the mask by nearest neighbor) and flipped at random. For
    evaluation, the whole image is resized to `image_size`, and the mask stays as it is: what counts is the prediction
    at the mask's own resolution.

    Args: those of `ImageTransform`, but `crop_ratio` is relative to the image's own width / height, so that a crop is
    on average distorted just as the whole image is at evaluation.
    """

    def __call__(
        self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform one image and its mask.

        Args:
            image (`PIL.Image.Image`): An image of any mode and size.
            mask (`np.ndarray`): Integers (height, width) of the image.
            rng (`numpy.random.Generator`, *optional*): Source of the crop and the flip; required for training.

        Returns:
            `tuple[Tensor, Tensor]`: Float32 pixels `(channels, height, width)`, and int64 labels of the output's size
            for training, of the mask's for evaluation.
        """
        if not self.train:
            return self._cut(image, (0, 0, *image.size), flip=False), torch.from_numpy(mask.astype(np.int64))
        rng = self._check_rng(rng)
        box = self._random_box(image.size, rng, aspect=image.width / image.height)
        flip = rng.random() < self.horizontal_flip
        height, width = self.image_size
        cut = Image.fromarray(mask.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST, box=box)
        labels: np.ndarray = np.asarray(cut)[:, ::-1] if flip else np.asarray(cut)
        return self._cut(image, box, flip), torch.from_numpy(labels.astype(np.int64))
