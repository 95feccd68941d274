"""The check of an export against PyTorch: real and random images at several sizes and batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import AdaLAError
from modeling_adala.inspection.towers import native_size, patch_size
from trainers.data.transforms import ImageTransform

from .formats import Runtime
from .tracing import Size, model_inputs, random_images

# largest difference of an output, relative to its largest value where that is above 1
BOUNDS = {"float32": 1e-4, "float16": 1e-2}
BATCHES = (1, 3)


@dataclass(frozen=True)
class Comparison:
    """Comparison of one batch.

    Args:
        size (`str`), batch (`int`), images (`str`): Such as `"224x224"`, 3, `"real"`.
        difference (`float`): Largest absolute difference over all outputs; NaN if one holds NaN.
        largest (`float`): Largest absolute value that PyTorch gives in that output.
    """

    size: str
    batch: int
    images: str
    difference: float
    largest: float

    @property
    def share(self) -> float:
        """The difference, relative to the largest value where that is above 1."""
        return self.difference / max(self.largest, 1.0)


def sizes_to_check(config: PretrainedConfig) -> list[Size]:
    """Return the native size, a smaller and a larger one, both rectangles, in pixels."""
    (height, width), (down, right) = native_size(config), patch_size(config)
    rows, columns = height // down, width // right
    grids = [(rows // 2 + 1, columns), (rows, columns), (rows + 1, columns + columns // 2)]
    return [(down * a, right * b) for a, b in grids]


def photographs() -> list[Image.Image]:
    """Return the two photographs that come with scikit-learn."""
    from sklearn.datasets import load_sample_images  # here, because it takes a second

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def compare(
    model: PreTrainedModel,
    runtime: Runtime,
    sizes: Iterable[Size],
    batches: Iterable[int],
    pictures: list[Image.Image],
    processor: Any,
    quiet: bool = False,
) -> list[Comparison]:
    """Run a model and its export side by side.

    Args:
        model (`PreTrainedModel`): In eval mode, in float32.
        runtime (`Runtime`): Its export.
        sizes (`Iterable[tuple[int, int]]`), batches (`Iterable[int]`): Height and width in pixels; numbers of images.
        pictures (`list[PIL.Image.Image]`): Real images; they are repeated where a batch has more.
        processor: Image processor of the model, or `None`, for their normalization.
        quiet (`bool`, *optional*, defaults to `False`): Show no progress.

    Raises:
        AdaLAError: If the export does not run, or has other outputs than the model.
    """
    cases = list(_cases(model.config, sizes, batches, pictures, processor))
    rows = []
    for size, images, pixels in tqdm(cases, desc="comparing with PyTorch", disable=quiet or None, leave=False):
        inputs = model_inputs(model, pixels)
        with torch.no_grad():
            expected = flat(model(**inputs))
        name = f"{size[0]}x{size[1]}"
        try:
            actual = runtime(inputs)
        except Exception as error:  # each runtime has exceptions of its own
            reason = str(error).strip().splitlines()[-1]
            raise AdaLAError(f"the export does not run at {name} pixels, batch {len(pixels)}: {reason}") from error
        if {key: value.shape for key, value in actual.items()} != {
            key: value.shape for key, value in expected.items()
        }:
            raise AdaLAError(
                f"the export gives {', '.join(actual)} where the model gives {', '.join(expected)}, or other shapes at"
                f" {name} pixels, batch {len(pixels)}; please report this."
            )
        rows.append(
            max((_compared(name, len(pixels), images, actual[key], expected[key]) for key in expected), key=_worst)
        )
    return rows


def check(rows: list[Comparison], bound: float) -> None:
    """Raise `AdaLAError` if a difference, relative to the largest value, exceeds a bound or is not a number."""
    worst = max(rows, key=_worst)
    if not worst.share <= bound:
        raise AdaLAError(
            f"the export differs from PyTorch by {worst.difference:.1e} at {worst.size} pixels, batch {worst.batch},"
            f" {worst.images} images, where values reach {worst.largest:.3g}: more than {bound:.0e} of that. Nothing"
            " is kept; another --dtype or fixed --sizes may fit this model, --max-difference sets another bound."
        )


def largest(rows: list[Comparison]) -> Comparison:
    """Return the comparison with the largest difference."""
    return max(rows, key=lambda row: row.difference)


def flat(output: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a model output by the names that an exported graph gives them."""
    if isinstance(output, Tensor):
        return {prefix: output}
    pairs = output.items() if hasattr(output, "items") else enumerate(output)
    found: dict[str, Tensor] = {}
    for key, value in pairs:
        if value is not None:
            found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _cases(
    config: PretrainedConfig,
    sizes: Iterable[Size],
    batches: Iterable[int],
    pictures: list[Image.Image],
    processor: Any,
) -> Iterator[tuple[Size, str, Tensor]]:
    channels = vision_config(config).num_channels
    for size in sizes:
        transform = ImageTransform.from_processor(processor, size, channels)
        for batch in batches:
            yield size, "real", torch.stack([transform(pictures[index % len(pictures)]) for index in range(batch)])
            yield size, "random", random_images(config, size, batch, seed=batch)


def _compared(size: str, batch: int, images: str, actual: Tensor, expected: Tensor) -> Comparison:
    difference = (actual.double() - expected.double()).abs().max().item()
    return Comparison(size, batch, images, difference, expected.abs().max().item())


def _worst(row: Comparison) -> float:
    return float("inf") if np.isnan(row.difference) else row.share
