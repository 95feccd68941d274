"""Views of one image through both models: features as colors, attention of a patch, scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from modeling_adala.configuration_adala import vision_config
from modeling_adala.inspection.towers import patch_size, token_groups, vision_tower
from modeling_adala.mixins import image_inputs
from modeling_adala.modeling_adala import models_of, stock_class
from trainers.data.transforms import ImageTransform
from trainers.evaluation.metrics import FeatureCosine
from trainers.report.pictures import ColorBasis, new_figure, patch_features, query_attention, show_weights

from .pair import Pair

# side in pixels of the pictures that are drawn
PICTURE = 512
TOP_CLASSES = 3


def prepare(pair: Pair, image: Image.Image, side: int) -> tuple[Tensor, Tensor]:
    """Return the centered square of an image as pixels for the models, and as a picture in 0..1.

    Args:
        pair (`Pair`): The models.
        image (`PIL.Image.Image`): An image of any mode and size.
        side (`int`): Side of the square in pixels.

    Returns:
        `tuple[Tensor, Tensor]`: `(1, channels, side, side)` on the models' device, and `(channels, side, side)`.
    """
    channels = vision_config(pair.config).num_channels
    pixels = ImageTransform.from_processor(pair.processor, side, channels)(image)
    picture = ImageTransform.from_processor(None, side, channels)(image)
    return pixels[None].to(pair.models["student"].device), picture


def feature_pictures(models: Mapping[str, PreTrainedModel], pixels: Tensor) -> tuple[dict[str, np.ndarray], float]:
    """Return the patch features of each model as colors in the teacher's basis, and the cosine of the two models.

    Returns:
        `tuple[dict[str, np.ndarray], float]`: `(PICTURE, PICTURE, 3)` of bytes by name.
    """
    features = {name: patch_features(model, pixels)[0] for name, model in models.items()}
    basis = ColorBasis.fit(features["teacher"])
    pictures = {}
    for name, values in features.items():
        colors = (255 * basis(values).nan_to_num(0.5)).round().byte().numpy()  # not a number: all patches are alike
        pictures[name] = np.asarray(Image.fromarray(colors).resize((PICTURE, PICTURE), Image.Resampling.NEAREST))
    student, teacher = (features[name].flatten(0, 1) for name in ("student", "teacher"))
    return pictures, FeatureCosine().compute(predictions=student, references=teacher)["cosine"]


def attention_pictures(
    models: Mapping[str, PreTrainedModel], pixels: Tensor, picture: Tensor, layer: int, point: tuple[float, float]
) -> dict[str, np.ndarray]:
    """Return the attention of the patch at a point, mean over heads, over the picture of each model.

    Args:
        models (`Mapping[str, PreTrainedModel]`): Models by name.
        pixels (`Tensor`), picture (`Tensor`): See `prepare`.
        layer (`int`): Layer index; negative numbers count from the end.
        point (`tuple[float, float]`): Place of the patch from the top and from the left, in 0..1.

    Returns:
        `dict[str, np.ndarray]`: `(PICTURE, PICTURE, 3)` of bytes by name.
    """
    config = models["student"].config
    rows, columns = (side // patch for side, patch in zip(pixels.shape[-2:], patch_size(config), strict=True))
    query = min(int(point[0] * rows), rows - 1), min(int(point[1] * columns), columns - 1)
    patches, pictures = token_groups(config)["patches"], {}
    for name, model in models.items():
        weights = query_attention(model, pixels, layer, query)[0, :, patches]
        figure = new_figure(PICTURE / 100, PICTURE / 100, dpi=100)
        axis = figure.add_axes((0, 0, 1, 1))
        axis.axis("off")
        show_weights(axis, picture, query, weights.mean(dim=0).unflatten(0, (rows, columns)))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures[name] = np.asarray(canvas.buffer_rgba())[..., :3]
    return pictures


@torch.no_grad()
def class_scores(model: Any, pixels: Tensor) -> list[tuple[str, float]] | None:
    """Return the most probable classes and their probabilities, or `None` for a model without a classifier."""
    heads = [stock_class(cls) for head, cls in models_of(model.config).items() if "ForImageClassification" in head]
    if not any(isinstance(model, head) for head in heads if head is not None):
        return None
    inputs = image_inputs(vision_tower(model).config, pixels)
    scores = model(**inputs).logits[0].float().softmax(dim=-1)
    best = scores.topk(min(TOP_CLASSES, len(scores)))
    return [(model.config.id2label[int(index)], float(score)) for score, index in zip(*best, strict=True)]


@torch.no_grad()
def text_scores(model: Any, tokenizer: Any, pixels: Tensor, texts: Sequence[str]) -> list[tuple[str, float]]:
    """Return how well texts fit an image: probabilities among them (CLIP), or of each by itself (SigLIP)."""
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    inputs = image_inputs(vision_tower(model).config, pixels)
    logits = model(**tokens.to(pixels.device), **inputs).logits_per_image[0].float()
    scores = logits.sigmoid() if hasattr(model, "logit_bias") else logits.softmax(dim=-1)
    return sorted(zip(texts, scores.tolist(), strict=True), key=lambda pair: -pair[1])
