"""Acceptance of exports: ONNX Runtime and OpenVINO give what PyTorch gives, for every family and head.

    python tests/check_exports.py --output benchmarks/results/exports.json

Tiny models of random weights, one layer softmax and one linear with random local mixing, each exported for any batch
and size and compared at three sizes and two batches, on photographs and on noise. Prints a Markdown table of the
largest differences, and ends with exit code 1 if one exceeds 1e-4. Takes about 20 minutes on one core; what is in
the JSON file already is not done again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from family_helpers import CASES, randomize, tiny_config

from modeling_adala.families import FAMILIES
from modeling_adala.inspection.towers import attention_modules
from modeling_adala.modeling_adala import MODELS
from trainers.runs.facts import describe_machine, software_versions
from vit_adala.export.formats import FORMATS, package_versions
from vit_adala.export.parity import Comparison, compare, flat, photographs
from vit_adala.export.tracing import export_model

BOUND = 1e-4
SIZES, BATCHES = ((24, 48), (32, 32), (48, 40)), (1, 3)
SQUARES = ((16, 16), (32, 32), (48, 48))  # for heads that take one size, a square
OPENVINO = ("vit", "dinov2", "clip_vision_model", "clip", "siglip_vision_model", "siglip")
MAPS = ("elu", "relu", "hedgehog")


def model_of(name: str, head: str, feature_map: str) -> Any:
    torch.manual_seed(0)
    options = {"softmax_layers": [0], "feature_map": feature_map}
    model = randomize(MODELS[name][head](tiny_config(MODELS[name]["Model"].config_class, **options)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in attention_modules(model):
            if getattr(module, "local_mixing", None) is not None:
                weight = module.local_mixing.weight
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def cases() -> Iterator[tuple[str, str, str, str]]:
    """Yield format, family, head and feature map."""
    for name, head in CASES:
        yield "onnx", name, head, "power"
    for feature_map in MAPS:
        yield "onnx", "vit", "Model", feature_map
    for name, head in CASES:
        if name in OPENVINO:
            yield "openvino", name, head, "power"


def run(form: str, name: str, head: str, feature_map: str) -> dict[str, Any]:
    """Export and compare one model."""
    model, start = model_of(name, head, feature_map), time.perf_counter()
    fixed = head == "ForMaskedImageModeling"
    rows: list[Comparison] = []
    for sizes in [[size] for size in SQUARES] if fixed else [list(SIZES)]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{FORMATS[form].suffix}"
            runtime = export_model(model, form, path, size=sizes[0] if fixed else None)
            rows += compare(model, runtime, sizes, BATCHES, photographs(), None, quiet=True)
            if FAMILIES[name].packed and "pixel_attention_mask" in runtime.inputs:
                rows.append(packed(model, runtime))
    worst = max(rows, key=lambda row: row.difference)
    return {
        "difference": worst.difference,
        "largest_value": worst.largest,
        "at": f"{worst.size}, batch {worst.batch}, {worst.images}",
        "comparisons": len(rows),
        "sizes": [f"{height}x{width}" for height, width in (SQUARES if fixed else SIZES)],
        "one_graph_per_size": fixed,
        "seconds": round(time.perf_counter() - start, 1),
    }


def packed(model: Any, runtime: Any) -> Comparison:
    """Compare a batch of two images of different grids, padded to one length."""
    grids, generator = torch.tensor([[3, 6], [4, 2]]), torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 18, dtype=torch.int32)
    mask[0, :18], mask[1, :8] = 1, 1
    inputs = {"pixel_values": torch.randn(2, 18, 192, generator=generator), "pixel_attention_mask": mask}
    inputs["spatial_shapes"] = grids
    if "input_ids" in runtime.inputs:
        inputs["input_ids"] = torch.randint(3, 50, (2, 5), generator=generator)
    with torch.no_grad():
        expected = flat(model(**inputs))
    actual = runtime(inputs)
    if "last_hidden_state" in expected:  # features of padding mean nothing
        for outputs in (expected, actual):
            outputs["last_hidden_state"] = outputs["last_hidden_state"][mask.bool()]
    names = [key for key in expected if key != "vision_model_output.last_hidden_state"]
    difference = max((actual[key] - expected[key]).abs().max().item() for key in names)
    return Comparison("3x6 and 4x2 patches", 2, "random", difference, expected[names[0]].abs().max().item())


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table: the largest difference over the heads of each family, and where a head has none."""
    lines = ["| family | heads | ONNX Runtime | OpenVINO |", "|---|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in CASES):
        heads, cells = [head for other, head in CASES if other == name], []
        for form in ("onnx", "openvino"):
            rows = [results[key] for head in heads if (key := f"{form} {name} {head} power") in results]
            errors = [row["error"] for row in rows if "error" in row]
            cells.append("; ".join(errors) or (f"{max(row['difference'] for row in rows):.1e}" if rows else ""))
        lines.append(f"| `{name}` | {', '.join(heads)} | {' | '.join(cells)} |")
    others = [f"{key.split()[-1]} {row['difference']:.1e}" for key, row in results.items() if key.split()[-1] in MAPS]
    return "\n".join([*lines, "", f"Other feature maps (`vit`, ONNX Runtime): {', '.join(others)}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results; resumed if it exists")
    parser.add_argument("--only", help="part of `format family head map`, such as 'openvino vit'")
    arguments = parser.parse_args()
    record = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"results": {}}
    record |= {"machine": describe_machine(), "versions": software_versions() | package_versions("onnx")}
    record["versions"] |= package_versions("openvino")
    for case in cases():
        key = " ".join(case)
        if key in record["results"] or (arguments.only and arguments.only not in key):
            continue
        try:
            record["results"][key] = run(*case)
        except Exception as error:
            record["results"][key] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print(key, record["results"][key], file=sys.stderr, flush=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["results"]))
    failed = [key for key, row in record["results"].items() if not row.get("difference", float("nan")) <= BOUND]
    print(f"\n{len(record['results'])} exports, {len(failed)} above {BOUND:.0e}: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
