"""`vit-adala export`: a model as an ONNX or OpenVINO graph, checked against PyTorch."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.filesize import decimal
from transformers import PretrainedConfig, PreTrainedModel

from hub_cards.records import MANIFEST, write_json
from modeling_adala.conversion.loading import (
    load_config,
    load_image_processor,
    load_student,
    load_teacher,
    weights_of,
)
from modeling_adala.conversion.stored_weights import hash_files
from modeling_adala.errors import AdaLAError, UsageError
from modeling_adala.families import get_family, is_adala
from modeling_adala.inspection.towers import patch_size
from modeling_adala.modeling_adala import head_of
from trainers.base_config import COUNT
from trainers.data.data_config import DataConfig, DataModule
from trainers.data.image_files import open_image
from trainers.data.segmentation_data import SegmentationData
from trainers.data.transforms import check_image_size, parse_size
from trainers.runs.facts import software_versions
from trainers.runs.output_folder import OutputFolder
from trainers.runs.settings import Interval, check_settings

from ..arguments import CommandParser, print_json
from ..export.formats import FORMATS, Runtime, check_packages, package_versions
from ..export.parity import BATCHES, BOUNDS, check, compare, flat, largest, photographs, sizes_to_check
from ..export.tracing import Size, check_size, export_model
from ..interruption import writes_to
from .common import absolute, finished_before

ANY = "any"
# as Transformers.js and Optimum look for them, and optimum-intel
NAMES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
OPENVINO_NAME = "openvino_model.xml"
_PICTURES = 4


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Folder or Hub id; linear or softmax.", "positional": "MODEL"})
    output_dir: str = field(metadata={"help": "Folder for the graph, configuration and image processor."})
    format: str = field(default="onnx", metadata={"help": f"One of {', '.join(FORMATS)}.", "choices": list(FORMATS)})
    sizes: list[str] = field(
        default_factory=lambda: [ANY],
        metadata={
            "help": "Image sizes, in pixels: any; one side or HEIGHTxWIDTH, which fixes it; or several, which are"
            " checked. Default: any."
        },
    )
    batch: str = field(default=ANY, metadata={"help": "Images in a batch: any, or a number, which fixes it."})
    dtype: str = field(
        default="float32",
        metadata={"help": "float32, or float16 for the weights.", "choices": list(BOUNDS)},
    )
    quantize: str | None = field(
        default=None,
        metadata={"help": "int8 for the matrix products; ONNX, and needs --dataset.", "choices": ["int8"]},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Images to check with, as for evaluate. Default: two photographs of scikit-learn."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels or masks."})
    max_difference: float | None = field(
        default=None,
        metadata={
            "help": "Largest difference from PyTorch, relative to the largest value where that is above 1. Default:"
            f" {', '.join(f'{bound:.0e} in {dtype}' for dtype, bound in BOUNDS.items())}.",
            "range": Interval(0, above=True),
        },
    )
    max_accuracy_drop: float = field(
        default=0.02, metadata={"help": "Largest loss of accuracy by int8, from 0 to 1.", "range": Interval(0, 1)}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON and nothing else on stdout."})

    def __post_init__(self):
        check_settings(self, {})
        if self.batch != ANY and (not self.batch.isdecimal() or COUNT.complaint(int(self.batch))):
            raise UsageError(f"batch={self.batch!r}: pass a number of images, 1 or more, or {ANY}.")
        if (ANY in self.sizes and len(self.sizes) > 1) or not self.sizes:
            raise UsageError(f"sizes={','.join(self.sizes)!r}: pass {ANY}, or sizes such as 224 or 336x448.")
        if self.quantize and (self.format != "onnx" or self.dtype != "float32"):
            raise UsageError("quantize='int8' is for --format onnx and --dtype float32; leave it or these out.")
        if self.quantize and self.dataset is None:
            raise UsageError("quantize='int8' needs labeled images, to measure what it costs; pass --dataset.")


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala export MODEL --output-dir O [--format onnx|openvino] [--sizes S ...] [--quantize int8] ...`.

    Raises:
        AdaLAError: If the graph cannot be made, or differs from PyTorch.
    """
    parser = CommandParser(
        "export",
        "Write a model as a graph for ONNX Runtime, Transformers.js or OpenVINO, and compare it with PyTorch on real"
        " and random images. A graph that differs is not kept.",
        "vit-adala export out/3-supervised --output-dir out/onnx --quantize int8 --dataset uoft-cs/cifar10",
        ExportArguments,
    )
    (args,) = parser.parse(arguments)
    # all that can be wrong is found here, before any time goes into weights
    check_packages(args.format)
    config = load_config(args.model)
    get_family(config.model_type)
    sizes = _sizes(config, args.sizes)
    settings = absolute({name: value for name, value in asdict(args).items() if name not in ("output_dir", "json")})
    folder = OutputFolder(args.output_dir, "export", settings, [args.model, args.dataset])
    writes_to(args.output_dir)
    if finished_before(folder):
        return
    model = (load_student(args.model) if is_adala(config) else load_teacher(args.model)).eval()
    check_size(model, free=len(sizes) != 1)
    processor = load_image_processor(args.model)
    data = None if args.dataset is None else _data(args, model, processor, sizes)
    with folder.claim(), folder.staging() as staging:
        record = _export(args, model, processor, data, sizes, staging)
        record["weights_sha256"] = hash_files(weights_of(args.model, config))
        model.config.save_pretrained(staging)
        if processor is not None:
            processor.save_pretrained(staging)
        write_json(staging / MANIFEST, {"export": record, "versions": software_versions()})
    if args.json:
        print_json(record)
    else:
        _show(args.model, folder.path, record)


def _export(
    args: ExportArguments,
    model: PreTrainedModel,
    processor: Any,
    data: DataModule | None,
    sizes: list[Size],
    staging: Path,
) -> dict[str, Any]:
    """Write and check the graph, and return what the manifest says of it."""
    start, batch = time.perf_counter(), None if args.batch == ANY else int(args.batch)
    path = staging / (NAMES[args.dtype] if args.format == "onnx" else OPENVINO_NAME)
    size = sizes[0] if len(sizes) == 1 else None
    runtime = export_model(model, args.format, path, size, batch, args.dtype == "float16")
    pictures = photographs() if data is None else _pictures(data)

    def compared(runtime: Runtime) -> list[Any]:
        checked, batches = sizes or sizes_to_check(model.config), BATCHES if batch is None else (batch,)
        return compare(model, runtime, checked, batches, pictures, processor)

    rows, bound = compared(runtime), args.max_difference or BOUNDS[args.dtype]
    check(rows, bound)
    worst = largest(rows)
    record: dict[str, Any] = {
        "format": args.format,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "sizes": [f"{height}x{width}" for height, width in sizes] or ANY,
        "batch": batch or ANY,
        "bound": bound,
        "difference": worst.difference,
        "largest_value": worst.largest,
        "comparisons": [asdict(row) for row in rows],
        "packages": package_versions(args.format),
    }
    if args.quantize is not None and data is not None:
        path, more = _quantize(args, model, data, path, runtime, compared)
        record |= more
    files = sorted(path.parent.glob(f"{path.stem}.*"))
    record["files"] = {file.name: file.stat().st_size for file in files}
    return record | {"inputs": runtime.inputs, "seconds": round(time.perf_counter() - start, 1)}


def _quantize(
    args: ExportArguments, model: PreTrainedModel, data: DataModule, path: Path, runtime: Runtime, compared: Any
) -> tuple[Path, dict[str, Any]]:
    """Replace the graph by its int8 form; return its path, and the accuracy before and after.

    Raises:
        AdaLAError: If the accuracy falls by more than `max_accuracy_drop`.
    """
    from ..export.quantization import AccuracyCheck, quantize

    measure = AccuracyCheck(model, data, None if args.batch == ANY else int(args.batch))
    target = path.with_name(NAMES["int8"])
    quantize(path, target)
    quantized = FORMATS["onnx"].open(target)

    def in_pytorch(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return flat(model(**inputs))

    before, after = measure(in_pytorch, "accuracy in float32"), measure(quantized, "accuracy in int8")
    name, lost = max(((name, before[name] - after[name]) for name in before), key=lambda pair: pair[1])
    if lost > args.max_accuracy_drop:
        raise AdaLAError(
            f"int8 lowers {name} from {before[name]:.4f} to {after[name]:.4f}, by more than"
            f" max_accuracy_drop={args.max_accuracy_drop:g}. Nothing is kept; leave --quantize out, or raise it."
        )
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    worst = largest(compared(quantized))
    accuracy = {"images": measure.images, "before": before, "after": after}
    quantization = {"difference": worst.difference, "largest_value": worst.largest, "accuracy": accuracy}
    return target, {"int8": quantization}


def _sizes(config: PretrainedConfig, given: Sequence[str]) -> list[Size]:
    """Return sizes in whole patches; none for any."""
    if ANY in given:
        return []
    return list(dict.fromkeys(check_image_size(parse_size("sizes", size), patch_size(config)) for size in given))


def _data(args: ExportArguments, model: PreTrainedModel, processor: Any, sizes: list[Size]) -> DataModule:
    size = f"{sizes[0][0]}x{sizes[0][1]}" if sizes else None
    columns: dict[str, Any] = {"image_column": args.image_column, "label_column": args.label_column}
    config = DataConfig(dataset=args.dataset, image_size=size, crop_scale=1, horizontal_flip=0, **columns)
    if args.quantize and head_of(model.config, type(model).__name__) == "ForSemanticSegmentation":
        labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
        return SegmentationData(config, model.config, processor, labels=labels, reduce_labels=False)
    return DataModule(config, model.config, processor)


def _pictures(data: DataModule) -> list[Image.Image]:
    rows = data.raw_train if data.raw_eval is None else data.raw_eval
    return [open_image(row[data.config.image_column], None, data.files) for row in islice(rows, _PICTURES)]


def _show(name: str, place: Path, record: dict[str, Any]) -> None:
    size = decimal(sum(record["files"].values()))
    kind = record["quantize"] or record["dtype"]
    sizes = "any image size" if record["sizes"] == ANY else f"images of {', '.join(record['sizes'])}"
    batch = "any batch" if record["batch"] == ANY else f"batches of {record['batch']}"
    rows = record["comparisons"]
    checked = ", ".join(dict.fromkeys(row["size"] for row in rows))
    batches = ", ".join(dict.fromkeys(str(row["batch"]) for row in rows))
    print(f"exported {name} to {', '.join(record['files'])} ({kind}, {sizes}, {batch}), {size}, in {place}")
    print(
        f"largest difference from PyTorch {record['difference']:.1e}, where values reach"
        f" {record['largest_value']:.3g}: {len(rows)} comparisons at {checked} pixels, batches of {batches}, real and"
        " random images"
    )
    if "int8" in record:
        found = record["int8"]
        accuracy = found["accuracy"]
        figures = [
            f"{name.replace('_', ' ')} {value:.2%} before, {accuracy['after'][name]:.2%} after"
            for name, value in accuracy["before"].items()
        ]
        print(
            f"int8: {'; '.join(figures)}, {accuracy['images']:,} images; largest difference {found['difference']:.1e}"
        )
