"""Attention weights of a model, as they are applied."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from .towers import attention_modules


@torch.no_grad()
def attention_map(model: PreTrainedModel, pixel_values: Tensor, layer: int, **kwargs: Any) -> Tensor:
    """Return the attention weights of one layer, as linear attention applies them.

    Args:
        model (`PreTrainedModel`): An AdaLA model, with or without a head.
        pixel_values (`Tensor`): `(batch, channels, height, width)`.
        layer (`int`): Layer index; negative numbers count from the end.
        kwargs: Passed to the model, such as `interpolate_pos_encoding=True`.

    Returns:
        `Tensor`: `(batch, heads, tokens, tokens)`, rows sum to 1 (just below it for linear layers).

    Raises:
        UsageError: For a layer that the model does not have, or a model in softmax mode.

    Example:

    ```python
    model = convert("facebook/dinov2-small")
    weights = attention_map(model, torch.randn(1, 3, 224, 224), layer=-1)
    ```
    """
    modules = attention_modules(model)
    if not -len(modules) <= layer < len(modules):
        raise UsageError(f"layer={layer} does not exist; this model has layers 0 to {len(modules) - 1}.")
    weights: list[Tensor | None] = []

    def ask(module, args, kwargs):  # this layer alone: each has N x N
        return args, kwargs | {"output_attentions": True}

    handles = (
        modules[layer].register_forward_pre_hook(ask, prepend=True, with_kwargs=True),
        modules[layer].register_forward_hook(lambda module, args, output: weights.append(output[1])),
    )
    try:
        model(pixel_values=pixel_values, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if weights[0] is None:
        raise UsageError(f"layer={layer} is in softmax mode; call model.set_attn_implementation('adala') first.")
    return weights[0]
