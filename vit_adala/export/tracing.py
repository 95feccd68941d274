"""Tracing a model into a graph whose batch and image size are fixed or free.

Positions on a learned grid take another branch at the size that they were made for, and a trace keeps the branch that
it saw: with a free size, models are therefore traced at another one. Resizing positions to the size that they have is
the identity, so that the graph is right there, too.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import AdaLAError, UsageError
from modeling_adala.families import get_family, is_adala
from modeling_adala.inspection.towers import native_size, patch_size, vision_tower
from modeling_adala.mixins import image_inputs
from modeling_adala.modeling_adala import head_of

from .formats import FORMATS, Runtime

Size = tuple[int, int]

_CAPTIONS, _WORDS = 3, 7


def check_size(model: PreTrainedModel, free: bool) -> None:
    """Raise `UsageError` for a model that has no graph of any size, if `free`.

    Those are the decoders of masked images, which take squares alone, and a ViT of rectangular images, whose positions
    cannot be resized in PyTorch either.
    """
    height, width = native_size(model.config)
    if not free:
        return
    what = ""
    if head_of(model.config, type(model).__name__) == "ForMaskedImageModeling":
        what = "decodes square images only"
    elif height != width and not get_family(vision_config(model.config).model_type).any_size:
        what = "has positions of a rectangle, which cannot be resized"
    if what:
        raise UsageError(f"sizes='any': {type(model).__name__} {what}; pass one size, such as {height}x{width}.")


def model_inputs(model: PreTrainedModel, pixel_values: Tensor) -> dict[str, Any]:
    """Return the arguments of a model's `forward` for images `(batch, channels, height, width)`.

    SigLIP 2 gets packed patches, a model of images and text some made-up captions.
    """
    tower = vision_tower(model)
    # a backbone, or a head on one, tells itself
    inputs = {"pixel_values": pixel_values}
    if not isinstance(tower, BackboneMixin):
        inputs = image_inputs(tower.config, pixel_values)
    if "pixel_attention_mask" in inputs:  # in the dtype of its image processor
        inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].to(torch.int32)
    if "input_ids" in signature(model.forward).parameters:
        text = model.config.text_config
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(3, text.vocab_size, (_CAPTIONS, _WORDS), generator=generator)
        words[:, -1] = text.eos_token_id  # CLIP takes the features of this word
        inputs["input_ids"] = words
    return inputs


def trace_size(config: PretrainedConfig) -> Size:
    """Return a small size, not square and with another number of patches than the native one."""
    (height, width), (down, right) = native_size(config), patch_size(config)
    columns = 5 if (height // down) * (width // right) != 15 else 7
    return 3 * down, columns * right


def random_images(config: PretrainedConfig, size: Size, batch: int, seed: int = 0) -> Tensor:
    """Return normal random pixels, `(batch, channels, height, width)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vision_config(config).num_channels, *size, generator=generator)


def export_model(
    model: PreTrainedModel,
    form: str,
    path: Path,
    size: Size | None = None,
    batch: int | None = None,
    half: bool = False,
) -> Runtime:
    """Write a model as a graph, and open what was written.

    Args:
        model (`PreTrainedModel`): In eval mode, in float32, on the CPU.
        form (`str`): One of `FORMATS`.
        path (`Path`): File to write; its suffix is `.onnx` or `.xml`.
        size (`tuple[int, int]`, *optional*): Height and width in pixels. Default: the graph takes any.
        batch (`int`, *optional*): Images in a batch. Default: the graph takes any number.
        half (`bool`, *optional*, defaults to `False`): Weights in float16. ONNX also computes in it, the states of
            linear attention aside; inputs and outputs stay float32.

    Raises:
        UsageError: See `check_size`.
        AdaLAError: If the model cannot be traced, or the graph has a fixed axis that should be free.
    """
    check_size(model, free=size is None)
    pixels = random_images(model.config, size or trace_size(model.config), batch or 2)
    inputs = model_inputs(model, pixels)
    shapes = _dynamic_shapes(inputs, size is None, batch is None)
    try:
        with _plain_operator(model), _bound(model, inputs) as tensors:
            if form == "onnx":
                _write_onnx(model, tensors, shapes, path, half)
            else:
                _write_openvino(model, tensors, shapes, path, half)
    except Exception as error:  # of any type, from any depth of the compiler
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AdaLAError(f"{type(model).__name__} cannot be traced for {form}: {reason}") from error
    runtime = FORMATS[form].open(path)
    for name, axes in shapes.items():
        fixed = [axis for axis in axes if name in runtime.inputs and runtime.inputs[name][axis] is not None]
        if fixed:
            raise AdaLAError(
                f"{type(model).__name__}: the {form} graph has a fixed {name} of shape {runtime.inputs[name]}, where"
                f" axis {fixed[0]} should be free; pass --sizes HEIGHTxWIDTH and --batch N, and please report this."
            )
    return runtime


def _dynamic_shapes(inputs: dict[str, Any], any_size: bool, any_batch: bool) -> dict[str, Any]:
    """Return the free axes of each input as `torch.export` takes them; captions are always free."""
    free = {
        "pixel_values": (2, 3) if inputs["pixel_values"].ndim == 4 else (1,),
        "pixel_attention_mask": (1,),
        "spatial_shapes": (),
    }
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            axes = (0, 1) if name == "input_ids" else (0,) * any_batch + free[name] * any_size
            shapes[name] = dict.fromkeys(axes, Dim.AUTO)
    return shapes


@contextmanager
def _bound(model: Any, inputs: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Bind the arguments that are no tensors for a while, and yield the others. They would become inputs."""
    forward = model.forward
    model.forward = partial(
        forward, **{name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    )
    try:
        yield {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    finally:
        del model.forward


@contextmanager
def _plain_operator(model: PreTrainedModel) -> Iterator[None]:
    """Have linear attention run in PyTorch for a while, regardless of what the environment chooses."""
    config = vision_tower(model).config
    before = getattr(config, "backend", None)
    if is_adala(config):
        config.backend = "torch"
    try:
        yield
    finally:
        if is_adala(config):
            config.backend = before


def _write_onnx(model: Any, inputs: dict[str, Any], shapes: dict[str, Any], path: Path, half: bool) -> None:
    from .onnx_graph import in_float32, name_axes, save
    from .upstream import export_onnx

    program = export_onnx(copy.deepcopy(model).half() if half else model, inputs, shapes)
    name_axes(program, shapes)
    in_float32(program)
    save(program, path)


def _write_openvino(model: Any, inputs: dict[str, Any], shapes: dict[str, Any], path: Path, half: bool) -> None:
    import openvino

    from .upstream import export_openvino

    program = export_openvino(model, inputs, shapes, half)
    # it takes any shape, whatever was traced; a grid of one row or column gives wrong features (OpenVINO 2026.4)
    least = dict(zip((2, 3), (2 * side for side in patch_size(model.config)), strict=True))
    program.reshape(
        {
            name: openvino.PartialShape(
                [
                    openvino.Dimension(least[axis] if value.ndim == 4 and axis in least else 0, -1)
                    if axis in shapes[name]
                    else openvino.Dimension(length)
                    for axis, length in enumerate(value.shape)
                ]
            )
            for name, value in inputs.items()
        }
    )
    openvino.save_model(program, str(path), compress_to_fp16=False)
