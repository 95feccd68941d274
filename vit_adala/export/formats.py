"""The formats of an export: what each needs, the files that it writes, and how they are run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from modeling_adala.errors import UsageError


@dataclass(frozen=True)
class Format:
    """One export format.

    Args:
        extra (`str`): Extra of setup.py that brings its packages.
        packages (`tuple[str, ...]`): Modules that it imports.
        suffix (`str`): Of its file.
        open (`Callable`): Opens a file of it, see `Runtime`.
    """

    extra: str
    packages: tuple[str, ...]
    suffix: str
    open: Callable[[Path], "Runtime"]


class Runtime:
    """An exported file, opened for the CPU with as many threads as PyTorch has.

    Args:
        inputs (`dict[str, list[int | None]]`): Shape of each input; `None` is an axis of any size.
        run (`Callable`): Takes arrays by input, returns arrays by output.
    """

    def __init__(self, inputs: dict[str, list[int | None]], run: Callable[[dict[str, Any]], dict[str, Any]]):
        self.inputs, self._run = inputs, run

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the outputs by name. `inputs` may hold more than the graph takes."""
        feed = {name: inputs[name].detach().cpu().numpy() for name in self.inputs}
        return {name: torch.as_tensor(value) for name, value in self._run(feed).items()}


def open_onnx(path: Path, threads: int | None = None) -> Runtime:
    """Open a `.onnx` file with ONNX Runtime; `threads` is PyTorch's number by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a failing run raises, and would also print
    options.intra_op_num_threads = threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    inputs = {
        item.name: [axis if isinstance(axis, int) else None for axis in item.shape] for item in session.get_inputs()
    }
    return Runtime(inputs, lambda feed: dict(zip(names, session.run(None, feed), strict=True)))


def open_openvino(path: Path) -> Runtime:
    """Open an OpenVINO `.xml` file, to be computed in float32 where hardware has faster types."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Core().compile_model(os.fspath(path), "CPU", options)
    inputs = {
        port.get_any_name(): [None if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape()]
        for port in model.inputs
    }
    names = [port.get_any_name() for port in model.outputs]

    def run(feed: dict[str, Any]) -> dict[str, Any]:
        outputs = model(feed)
        return {name: outputs[index].copy() for index, name in enumerate(names)}

    return Runtime(inputs, run)


FORMATS = {
    "onnx": Format("onnx", ("onnx", "onnx_ir", "onnxscript", "onnxruntime"), ".onnx", open_onnx),
    "openvino": Format("openvino", ("openvino",), ".xml", open_openvino),
}


def check_packages(name: str) -> None:
    """Raise `UsageError` if a package of a format is missing, or PyTorch is too old for the exporters."""
    form = FORMATS[name]
    missing = [package for package in form.packages if find_spec(package) is None]
    if Version(torch.__version__) < Version("2.11"):
        missing.append(f"torch 2.11 or later instead of {torch.__version__}")
    if missing:
        raise UsageError(f"format={name!r} needs {', '.join(missing)}; run pip install 'vit-adala[{form.extra}]'.")


def package_versions(name: str) -> dict[str, str]:
    """Return the installed versions of the packages of a format."""
    return {package: version(package) for package in FORMATS[name].packages}
