"""`vit-adala features`: pictures of patch features and attention, student beside teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_adala.attention_interface import feature_map_of
from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.loading import (
    load_config,
    load_image_processor,
    load_student,
    load_teacher,
    load_teacher_config,
)
from modeling_adala.errors import DataError, UsageError
from modeling_adala.families import get_family, is_adala
from modeling_adala.inspection.towers import attention_modules, native_size, patch_size, token_groups
from trainers.alignment_trainer import check_pair
from trainers.data.image_files import ImageFiles, Unreadable, blaming, open_image
from trainers.data.transforms import ImageTransform, check_image_size, parse_size
from trainers.evaluation.metrics import FeatureCosine
from trainers.report.pictures import (
    ColorBasis,
    check_layer,
    check_query,
    draw_attention,
    draw_colors,
    patch_features,
    query_attention,
)

from ..arguments import CommandParser


@dataclass
class FeaturesArguments:
    model: str = field(metadata={"help": "Folder or Hub id; linear or softmax.", "positional": "MODEL"})
    images: list[str] = field(metadata={"help": "Image files.", "positional": "IMAGE"})
    teacher: str | None = field(default=None, metadata={"help": "Softmax checkpoint to show beside the model."})
    layer: int = field(
        default=-1, metadata={"help": "Layer of the attention maps, from 0 or, negative, from the end."}
    )
    query: str | None = field(
        default=None, metadata={"help": "Patch that attends, ROW,COLUMN from the top left. Default: the middle."}
    )
    image_size: str | None = field(
        default=None,
        metadata={
            "help": "Side in pixels, or HEIGHTxWIDTH: the largest centered crop of that shape. Default: the model's."
        },
    )
    output_dir: str = field(default="features", metadata={"help": "Folder for the PNG files."})


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala features MODEL IMAGE ... [--teacher T] [--layer L] [--query ROW,COLUMN] [--output-dir O]`."""
    parser = CommandParser(
        "features",
        "Draw the attention of one patch, and patch features as colors (three principal components, the teacher's for"
        " both models).",
        "vit-adala features out/2-feature-alignment street.jpg --teacher facebook/dinov2-small --image-size 336x448",
        FeaturesArguments,
    )
    (args,) = parser.parse(arguments)

    config = load_config(args.model)
    get_family(config.model_type)
    size = native_size(config) if args.image_size is None else parse_size("image_size", args.image_size)
    size = check_image_size(size, patch_size(config))
    query = check_query(config, size, args.query and _parse_query(args.query))
    layer = check_layer(config, args.layer)
    out = Path(args.output_dir)
    paths = [out / f"attention-{number}-{Path(name).stem}.png" for number, name in enumerate(args.images, start=1)]
    _check_new(out / "features.png", *paths)
    channels = vision_config(config).num_channels
    pictures = _read(args.images, ImageTransform.from_processor(None, size, channels))
    transform = ImageTransform.from_processor(load_image_processor(args.model), size, channels)
    pixels = _read(args.images, transform)

    models = _load(args.model, args.teacher)
    out.mkdir(parents=True, exist_ok=True)
    _draw_features(out / "features.png", models, pixels, pictures)
    patches = token_groups(config)["patches"]
    progress = tqdm(args.images, desc="attention maps", disable=None)
    for index, (name, path, picture) in enumerate(zip(progress, paths, pictures, strict=True)):
        weights = {}
        for label, model in models.items():
            rows = query_attention(model, pixels[index : index + 1].to(model.device), layer, query)[0, :, patches]
            weights[f"{label}, {_kind(model, layer)}"] = rows.unflatten(1, _grid(model, size))
        draw_attention(path, picture, query, weights, f"{Path(name).name}, layer {layer}: attention of one patch")
        print(path)


def _check_new(*paths: Path) -> None:
    """Raise `UsageError` if a picture would replace a file."""
    for path in paths:
        if path.exists():
            raise UsageError(f"output_dir={str(path.parent)!r} already holds {path.name}; pass another --output-dir.")


def _draw_features(path: Path, models: dict[str, PreTrainedModel], pixels: Tensor, pictures: Tensor) -> None:
    features = {}
    for label, model in models.items():
        progress = tqdm(pixels, desc=f"features, {label}", disable=None)
        features[label] = torch.cat([patch_features(model, image[None].to(model.device)) for image in progress])
    first, *others = features
    basis, colors = ColorBasis.fit(features[first]), {}
    for label, values in features.items():
        cosine = FeatureCosine().compute(predictions=values, references=features[first])["cosine"]
        colors[f"{label}, cosine {cosine:.3f}" if label in others else label] = basis(values)
    draw_colors(path, pictures, colors)
    print(path)


def _load(name: str, teacher_name: str | None) -> dict[str, PreTrainedModel]:
    """Return the models by label, first the one whose principal components are shown."""
    if teacher_name is not None:
        load_teacher_config(teacher_name)
    is_linear = is_adala(load_config(name))
    model = load_student(name) if is_linear else load_teacher(name)
    models = {"model": model}
    if teacher_name is not None:
        teacher = load_teacher(teacher_name)
        check_pair(teacher, model)
        models = {"teacher": teacher, "student": model}
    return {label: model.eval().to(PartialState().device) for label, model in models.items()}


def _read(names: Sequence[str], transform: ImageTransform) -> Tensor:
    """Return images as `(images, channels, height, width)`.

    Raises:
        DataError: For a file that is missing or not an image.
    """
    images, files = [], ImageFiles(external=True)  # named by the user
    for name in names:
        try:
            with blaming(name, files):
                images.append(transform(open_image(name, None, files)))
        except Unreadable as error:
            raise DataError(
                f"image {name!r} cannot be shown: {error}; pass image files such as PNG or JPEG."
            ) from error
    return torch.stack(images)


def _parse_query(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"query={text!r} is not a valid patch; pass ROW,COLUMN from the top left, such as 12,16.")
    return int(parts[0]), int(parts[1])


def _kind(model: PreTrainedModel, layer: int) -> str:
    is_linear = is_adala(vision_config(model.config))
    return "linear" if is_linear and feature_map_of(attention_modules(model)[layer]) is not None else "softmax"


def _grid(model: PreTrainedModel, size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (side // patch for side, patch in zip(size, patch_size(model.config), strict=True))
    return rows, columns
