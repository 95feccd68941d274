"""The exporters of Transformers, which it calls experimental; see `modeling_adala/upstream.py`."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers.exporters import OnnxConfig, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer, OpenVINOConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.exporter_openvino import OpenVINOExporter
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers

__all__ = ["export_onnx", "export_openvino", "quantize_onnx"]

_TALKATIVE = ("root", "torch.onnx", "onnxscript", "onnx_ir", "transformers", "openvino")


def export_onnx(model: Any, inputs: dict[str, Any], dynamic_shapes: dict[str, Any]) -> Any:
    """Return a model as an `onnx_ir.Model`."""
    with _quietly(), _symbolic_sizes():
        config = OnnxConfig(dynamic_shapes=dynamic_shapes)
        return OnnxExporter().export(model, dict(inputs), config).program


def quantize_onnx(program: Any) -> Any:
    """Return an `onnx_ir.Model` whose products with constant weights are int8, scaled by output channel."""
    with _quietly():
        config = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
        return OnnxRuntimeQuantizer(config).quantize(program, {}, "onnx")


def export_openvino(model: Any, inputs: dict[str, Any], dynamic_shapes: dict[str, Any], half: bool) -> Any:
    """Return a model as an `openvino.Model`, its weights in float16 if `half`."""
    with _quietly(), _symbolic_sizes(), _no_telemetry():
        config = OpenVINOConfig(dynamic_shapes=dynamic_shapes, compress_to_fp16=half)
        return OpenVINOExporter().export(model, dict(inputs), config).program


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporters' progress off stdout, and their advice for authors of exporters off the log."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad():
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _symbolic_sizes() -> Iterator[None]:
    """Keep DINOv2 with registers from fixing the image size by `int`, as it does outside of `torch.jit` (5.24)."""
    module: Any = modeling_dinov2_with_registers
    before = module.torch_int
    module.torch_int = lambda size: size if isinstance(size, torch.SymInt) else before(size)
    try:
        yield
    finally:
        module.torch_int = before


@contextlib.contextmanager
def _no_telemetry() -> Iterator[None]:
    """Keep OpenVINO from reporting the conversion to its makers, as it does unless it takes itself to be tested."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
