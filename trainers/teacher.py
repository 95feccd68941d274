"""The frozen teacher of stages 1 and 2: weights as they are multiplied, and taps on its attention."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_adala.families import get_family
from modeling_adala.inspection.towers import attention_modules, forward_tower


@dataclass(frozen=True)
class Tap:
    """Inputs and outputs of one attention module.

    Args:
        args (`tuple`), kwargs (`dict`): Its arguments: hidden states, and what a family adds, such as DINOv3's rotary
            positions.
        context (`Tensor`): What its heads give, `(batch, tokens, channels)`, before the output projection.
        output (`Tensor`): After it, `(batch, tokens, hidden_size)`.
    """

    args: tuple
    kwargs: dict[str, Any]
    context: Tensor
    output: Tensor


class _SeenAll(Exception):
    """Raised to stop the teacher's forward pass early."""


def with_cast_weights(teacher: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy of a teacher whose linear layers hold their weights in `dtype`, to run under autocast to it.

    Its outputs are those of the teacher itself, bit for bit: autocast would cast the same weights at every step. All
    else stays in float32, because autocast computes the rest there: targets of a teacher wholly in bf16 are a fifth
    further from those in float32, and no faster within the noise (docs/experiments.md).
    """
    teacher = copy.deepcopy(teacher)
    for module in teacher.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return teacher


@torch.no_grad()
def visit_attention(
    teacher: PreTrainedModel, pixel_values: Tensor, layers: Sequence[int], visit: Callable[[int, Tap], None]
) -> None:
    """Run a teacher on images and visit some attention modules, each as soon as it has run.

    Nothing of a block is kept once its visit is over, and nothing after the last of them runs.

    Args:
        teacher (`PreTrainedModel`): Softmax model.
        pixel_values (`Tensor`): `(batch, channels, height, width)`.
        layers (`Sequence[int]`): Which attention modules, counted from 0, ascending.
        visit (`Callable`): Called with the layer and what passes through it. Gradients are off.
    """
    modules, contexts = attention_modules(teacher), list[Tensor]()

    def tap(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
            visit(layer, Tap(args, kwargs, contexts.pop(), output[0]))
            if layer == layers[-1]:
                raise _SeenAll

        return hook

    handles = []
    for layer in layers:
        projection = output_projection(modules[layer])
        handles += [
            modules[layer].register_forward_pre_hook(_cast_once, with_kwargs=True),
            projection.register_forward_pre_hook(lambda module, args: contexts.append(args[0])),
            modules[layer].register_forward_hook(tap(layer), with_kwargs=True),
        ]
    try:
        forward_tower(teacher, pixel_values)
    except _SeenAll:
        pass
    finally:
        for handle in handles:
            handle.remove()


def output_projection(attention: nn.Module) -> nn.Linear:
    """Return the projection after the heads, which families name differently."""
    projection = attention.get_submodule(_projection_name(attention))
    assert isinstance(projection, nn.Linear)
    return projection


@contextmanager
def without_output_projection(attention: nn.Module) -> Iterator[None]:
    """Make an attention module return the output of its heads, `(batch, tokens, channels)`."""
    name = _projection_name(attention)
    projection = attention.get_submodule(name)
    setattr(attention, name, nn.Identity())
    try:
        yield
    finally:
        setattr(attention, name, projection)


def _projection_name(attention: nn.Module) -> str:
    config: Any = attention.config
    return get_family(config.model_type).output_projection


def _cast_once(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    # autocast would cast the hidden states for each of six projections, and the student would keep three copies
    states = args[0] if args else kwargs["hidden_states"]
    device = states.device.type
    if not torch.is_autocast_enabled(device) or states.dtype != torch.float32:
        return None
    states = states.to(torch.get_autocast_dtype(device))
    return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})
