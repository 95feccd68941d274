"""`vit-adala embed`: the features of a dataset in a parquet file."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState

from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.loading import (
    load_config,
    load_image_processor,
    load_student,
    load_teacher,
    weights_of,
)
from modeling_adala.conversion.stored_weights import hash_files
from modeling_adala.errors import UsageError
from modeling_adala.families import get_family, is_adala
from modeling_adala.inspection.towers import native_size, patch_size
from trainers.base_config import COUNT, evaluation_dtype
from trainers.data.data_config import LARGEST_BATCH, TOKENS_PER_BATCH
from trainers.data.sources import fingerprint, image_files, load_images
from trainers.data.transforms import ImageTransform, check_image_size, parse_size
from trainers.evaluation.embeddings import DTYPES, EmbeddingFile, RowsWithNumbers, embed
from trainers.runs.settings import Interval, check_settings

from ..arguments import CommandParser
from .common import absolute


@dataclass
class EmbedArguments:
    model: str = field(metadata={"help": "Folder or Hub id; linear or softmax.", "positional": "MODEL"})
    data: str = field(
        metadata={"help": "Hub id, folder of images or parquet files, or mnist-digits.", "positional": "DATA"}
    )
    output: str = field(metadata={"help": "Parquet file to write.", "short": "o"})
    split: str | None = field(
        default=None,
        metadata={"help": "Split to embed; slices work, as in train[:500]. Default: train, or the only one."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column to keep, where there is one."})
    image_size: str | None = field(
        default=None, metadata={"help": "Side in pixels, or HEIGHTxWIDTH. Default: the model's."}
    )
    patches: bool = field(default=False, metadata={"help": "Also write the features of every patch."})
    dtype: str = field(default="float32", metadata={"help": "float32 or float16.", "choices": list(DTYPES)})
    batch_size: int | None = field(
        default=None, metadata={"help": "Images at a time. Default: 64, fewer if they are large.", "range": COUNT}
    )
    max_broken_fraction: float = field(
        default=0.01,
        metadata={"help": "Share of images that may be unreadable and are left out, 0 to 1.", "range": Interval(0, 1)},
    )
    allow_external_images: bool = field(
        default=False, metadata={"help": "Open URLs, and paths outside of the dataset's folder, that rows name."}
    )

    def __post_init__(self):
        check_settings(self, {})
        if not self.output.endswith(".parquet"):
            raise UsageError(f"output={self.output!r} is not the name of a parquet file; pass one such as a.parquet.")


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala embed MODEL DATA -o FILE.parquet [--split S] [--patches] [--dtype float16] ...`."""
    parser = CommandParser(
        "embed",
        "Write class token, mean patch and, if wanted, every patch of a dataset's images into a parquet file, labels"
        " kept. If it is killed, the same command goes on, and the file is the same.",
        "vit-adala embed out/2-feature-alignment uoft-cs/cifar10 --split test -o cifar10-test.parquet",
        EmbedArguments,
    )
    (args,) = parser.parse(arguments)
    _check_place(args.output, args.model, args.data)
    config = load_config(args.model)
    get_family(config.model_type)
    size = native_size(config) if args.image_size is None else parse_size("image_size", args.image_size)
    height, width = check_image_size(size, patch_size(config))
    rows = load_images(args.data, args.split, image_column=args.image_column)
    processor = load_image_processor(args.model)
    transform = ImageTransform.from_processor(processor, (height, width), vision_config(config).num_channels)
    down, right = patch_size(config)
    fitting = min(max(TOKENS_PER_BATCH // ((height // down) * (width // right)), 1), LARGEST_BATCH)
    batch_size, autocast = args.batch_size or fitting, evaluation_dtype()
    settings = absolute({name: value for name, value in asdict(args).items() if name != "output"}) | {
        "batch_size": batch_size,
        "image_size": f"{height}x{width}",
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "device": PartialState().device.type,
        "weights_sha256": hash_files(weights_of(args.model, config)),
        "data_fingerprint": fingerprint(rows),
        "transform": transform.settings(),
    }
    file = EmbeddingFile(Path(args.output), settings)
    if file.finished:
        file.tidy()
        print(f"embed: already done, in {args.output}")
        return
    reading: dict[str, Any] = {"image_column": args.image_column, "max_broken_fraction": args.max_broken_fraction}
    images = RowsWithNumbers(rows, transform, **reading, files=image_files(args.data, args.allow_external_images))
    model = (load_student(args.model) if is_adala(config) else load_teacher(args.model)).to(PartialState().device)
    options: dict[str, Any] = {"batch_size": batch_size, "patches": args.patches, "dtype": args.dtype}
    with file.claim():
        count = embed(file, model, images, _labels(rows, args), **options, autocast_dtype=autocast)
    broken = len(images) - count
    print(f"embedded {count:,} images{f', {broken:,} left out as unreadable' * (broken > 0)}; saved {args.output}")


def _labels(rows: datasets.Dataset, args: EmbedArguments) -> datasets.Dataset | None:
    """Return the label column, if there is one of single values; masks stay where they are."""
    feature = (rows.features or {}).get(args.label_column)
    if not isinstance(feature, datasets.ClassLabel | datasets.Value) or args.label_column == args.image_column:
        return None
    return rows.with_format(None).select_columns(args.label_column)


def _check_place(output: str, *sources: str) -> None:
    """Raise `UsageError` for a file in the folder of the model or the data, which would change by it."""
    place = Path(os.path.realpath(output))
    if place.is_dir():
        raise UsageError(f"output={output!r} is a folder; pass the name of a parquet file.")
    for source in sources:
        other = (
            Path(os.path.realpath(Path(source).expanduser())) if os.path.exists(Path(source).expanduser()) else None
        )
        if other is not None and place.is_relative_to(other):
            raise UsageError(f"output={output!r} lies in {source!r}, which is read; pass another place.")
