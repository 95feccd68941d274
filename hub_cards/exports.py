"""The ONNX graphs that a checkpoint is pushed with: what their records say, and whether they are of its weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_adala.conversion.stored_weights import hash_files, weight_files
from modeling_adala.errors import UsageError

from .records import MANIFEST, mapping, number, one_line, read_json

FOLDER = "onnx"
"""Folder of a repository in which Optimum and Transformers.js look for graphs."""

ACCURACIES = {
    "head_accuracy": "accuracy",
    "head_mean_iou": "mean IoU",
    "knn_accuracy": "k-NN accuracy",
    "linear_probe_accuracy": "linear probe accuracy",
}
"""Names of the figures that an int8 graph is judged by."""


@dataclass(frozen=True)
class OnnxExport:
    """One graph, as `vit-adala export` recorded it.

    Args:
        files (`list[Path]`): The graph, and its weights if they are in a file of their own.
        kind (`str`): `float32`, `float16` or `int8`.
        sizes (`list[str]`): Image sizes that it takes, as `224x224`; empty for any.
        batch (`int`, *optional*): Images in a batch; `None` for any number.
        difference (`float`, *optional*): Largest difference of an output from PyTorch.
        accuracy (`dict[str, list[float]]`): Figures before and after quantization, by name.
    """

    files: list[Path]
    kind: str
    sizes: list[str] = field(default_factory=list)
    batch: int | None = None
    difference: float | None = None
    accuracy: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the graph in the repository."""
        return f"{FOLDER}/{self.files[0].name}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


def read_exports(folders: Sequence[str | Path], directory: Path) -> list[OnnxExport]:
    """Return the exports in these folders, known to be of the weights in a checkpoint folder.

    Raises:
        UsageError: For a folder without a finished ONNX export, one of other weights, and two of one name.
    """
    digest, exports = hash_files(weight_files(directory)) if folders else "", list[OnnxExport]()
    for folder in map(Path, folders):
        manifest, argument = read_json(folder / MANIFEST), f"with_onnx={str(folder)!r}"
        record = mapping(manifest.get("export"))
        names = list(mapping(record.get("files")))
        complete = bool(names) and all(Path(name).name == name and (folder / name).is_file() for name in names)
        if record.get("format") != "onnx" or mapping(manifest.get("run")).get("status") != "finished" or not complete:
            raise UsageError(f"{argument} holds no finished ONNX export; pass the folder that vit-adala export wrote.")
        if record.get("weights_sha256") != digest:
            raise UsageError(f"{argument} was exported from other weights than {str(directory)!r}; export them again.")
        exports.append(_from_record(record, sorted(folder / name for name in names)))
    names = [export.name for export in exports]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"with_onnx names {name} twice; pass one export of each type.")
    return exports


def _from_record(record: dict[str, Any], files: list[Path]) -> OnnxExport:
    int8 = mapping(record.get("int8"))
    accuracy, sizes = mapping(int8.get("accuracy")), record.get("sizes")
    before, after = mapping(accuracy.get("before")), mapping(accuracy.get("after"))
    figures = {name: [number(before[name]), number(after.get(name))] for name in before}
    return OnnxExport(
        files=files,
        kind="int8" if int8 else one_line(record.get("dtype")) or "",
        sizes=[size for size in map(one_line, sizes) if size] if isinstance(sizes, list) else [],
        batch=record["batch"] if isinstance(record.get("batch"), int) else None,
        difference=number((int8 or record).get("difference")),
        accuracy={name: pair for name, pair in figures.items() if None not in pair},  # type: ignore[misc]
    )
