"""What is done to an ONNX graph after tracing: names of free axes, float32 at its ends, files."""

import re
from pathlib import Path
from typing import Any

import onnx_ir
from onnx_ir import DataType, Model, Shape, SymbolicDim, Value

# protobuf holds 2 GB: a larger graph keeps its weights in a second file, under the name that Optimum and
# Transformers.js look for
_ONE_FILE = 2**31 - 2**27
_EXTERNAL = "{}_data"
_AXES = {
    "pixel_values": ("batch", None, "height", "width"),
    "packed": ("batch", "patches", None),
    "input_ids": ("captions", "words"),
}


def name_axes(model: Model, shapes: dict[str, Any]) -> None:
    """Call the free axes `batch`, `height`, ... instead of `s99`, in the shapes of all values."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        known = _AXES.get("packed" if value.name == "pixel_values" and len(_dims(value)) == 3 else str(value.name))
        for axis, name in zip(_dims(value), known or ()):
            if isinstance(axis, SymbolicDim) and name is not None:
                names[str(axis.value)] = name
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in _values(model):
        dims = [
            SymbolicDim(pattern.sub(lambda found: names[found[0]], axis.value))
            if isinstance(axis, SymbolicDim) and axis.value is not None
            else axis
            for axis in _dims(value)
        ]
        value.shape = None if value.shape is None else Shape(dims)


def in_float32(model: Model) -> None:
    """Take and return float32 where a graph takes and returns float16, as image processors and callers expect."""
    graph = model.graph
    for value in graph.inputs:
        if value.dtype == DataType.FLOAT16:
            value.dtype = DataType.FLOAT
            cast = onnx_ir.node("Cast", [value], {"to": DataType.FLOAT16})
            cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, DataType.FLOAT16
            users = [use for use in value.uses() if use.node is not cast]
            for use in users:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            graph.insert_before(graph[0], cast)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype == DataType.FLOAT16:
            cast = onnx_ir.node("Cast", [value], {"to": DataType.FLOAT})
            output = cast.outputs[0]
            output.shape, output.dtype = value.shape, DataType.FLOAT
            output.name, value.name = value.name, f"{value.name}_float16"
            graph.append(cast)
            graph.outputs[index] = output


def save(model: Model, path: Path) -> None:
    """Write a graph as one file, or with its weights in a second one beside it if they are too large for that."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    onnx_ir.save(model, path, external_data=_EXTERNAL.format(path.name) if weights > _ONE_FILE else None)


def _values(model: Model) -> list[Value]:
    return [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]


def _dims(value: Value) -> list[Any]:
    return [] if value.shape is None else list(value.shape)
