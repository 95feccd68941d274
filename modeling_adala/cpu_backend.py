"""Linear attention on a CPU, in blocks of images and tokens that fit the caches, forward and backward.

A block goes through passes over its features (`cpu_passes.py`) and PyTorch's matrix products; on a processor that
multiplies bfloat16, `cpu_fused.c` and `cpu_fused_backward.c` do all of it in one call each. Nothing of the size of all
tokens is allocated but results, and queries, keys and values are read where they lie.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cpu_passes import CompiledPasses, TorchPasses, load_library
from .feature_maps import accumulation_dtype, largest_key
from .upstream import cpu_has_bfloat16_products

# Numbers in the features of a block: they stay in the second-level caches of a few cores, far below the 32 MB from
# which glibc gives memory back to the system at every free.
BLOCK_NUMEL = 2**19


class State(NamedTuple):
    """What linear attention knows of all keys and values, by head of an image.

    As sums over the tokens, with eps times their number, and not as means: bfloat16 has the range for it.

    Args:
        state (`Tensor`): N S, `(batch * heads, features, value_dim)`, in the dtype of the products; that of the fused
            passes is float32, and both are as wide as whole vectors.
        normalizer (`Tensor`): N z, `(batch * heads, 1, features)`.
        eps (`Tensor`): N eps, `(batch * heads, 1, 1)`, of real tokens.
        key_max (`Tensor`, *optional*): Largest keys, `(batch * heads, 1, dim)`, for `exp`.
    """

    state: Tensor
    normalizer: Tensor
    eps: Tensor
    key_max: Tensor | None


def unavailable(device_type: str) -> str | None:
    """Why this process cannot use the compiled passes, in words; `None` if it can."""
    if device_type != "cpu":
        return f"backend cpu is for a CPU and not for {device_type}"
    if load_library() is None:
        return "its compiled passes were not built, or not for this machine (see setup.py)"
    return None


def linear_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    nonlinearity: str,
    scale: float,
    key_mask: Tensor | None,
    eps: float,
    compiled: bool = True,
) -> Tensor:
    """Linear attention after the affine part of a feature map; see `linear_attention`.

    Features are computed in float32 and multiplied in bfloat16 where the values are and the CPU can, in float32 (or
    float64) otherwise. The queries' features come divided by their normalizer, so that the second product is the
    output. Deviates from the canonical form in bfloat16: the state is rounded for the second product, and without
    `cpu_fused.c` each block's part of it before it is added to the float32 sum, because PyTorch's bfloat16 products
    give bfloat16 on a CPU. The gradient of a query is what remains where the mean of all values cancels, which a
    rounded state does not survive: `cpu_fused_backward.c` takes the mean out first, and all else multiplies in float32
    when there will be a backward pass.

    Args:
        query, key, value, key_mask, eps: See `linear_attention`.
        nonlinearity (`str`): See `apply_nonlinearity`.
        scale (`float`): Factor on query and key.
        compiled (`bool`, *optional*, defaults to `True`): Compiled passes where they can (a warning says so once where
            they cannot), or those in PyTorch.
    """
    dtype = product_dtype(value)
    compiled = compiled and CompiledPasses.supports(query, nonlinearity, dtype)
    passes = (CompiledPasses if compiled else TorchPasses)(nonlinearity, scale, eps)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if differentiable and dtype == torch.bfloat16 and not passes.fuses(key, value):
        dtype = torch.float32
    q, k, v = (_readable(x, dtype) for x in (query, key, value))
    if differentiable:
        return _LinearAttention.apply(q, k, v, key_mask, passes).to(value.dtype)
    return _forward(q, k, v, key_mask, passes)[0].to(value.dtype)


def product_dtype(value: Tensor) -> torch.dtype:
    """In what this CPU multiplies features and values."""
    if value.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float64 if value.dtype == torch.float64 else torch.float32


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; without, it is slower at it than in float32."""
    return cpu_has_bfloat16_products()


class _LinearAttention(torch.autograd.Function):
    """Keeps queries, keys, values and states, and computes features again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, passes: TorchPasses):
        output, states = _forward(query, key, value, key_mask, passes, keep_states=True)
        ctx.save_for_backward(query, key, value, key_mask, *(tensor for state in states for tensor in state))
        ctx.passes = passes
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        query, key, value, key_mask, *saved = ctx.saved_tensors
        states = [State(*saved[i : i + 4]) for i in range(0, len(saved), 4)]
        gradients = [_empty(x, x.shape[-1]) for x in (query, key, value)]
        gradient = _readable(gradient, value.dtype)
        if ctx.passes.fuses(key, value):
            state, normalizer, eps, key_max = saved
            kept = eps, key_max, state, normalizer
            ctx.passes.attention_gradient(query, key, value, key_mask, *kept, gradient, gradients)
            return *gradients, None, None
        with torch.autocast("cpu", enabled=False):
            for images, state in zip(_images(key, ctx.passes), states, strict=True):
                inputs = [_of_images(x, images) for x in (query, key, value, key_mask)]
                incoming, outgoing = _of_images(gradient, images), [_of_images(x, images) for x in gradients]
                _backward(inputs, incoming, outgoing, state, ctx.passes)
        return *gradients, None, None


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    passes: TorchPasses,
    keep_states: bool = False,
) -> tuple[Tensor, list[State]]:
    output = _empty(query, value.shape[-1])
    states: list[State] = []
    if passes.fuses(key, value):
        eps, key_max = _sum_of_eps(key, key_mask, passes), _largest_key(key, key_mask, passes)
        kept = passes.attention(query, key, value, key_mask, eps, key_max, output, keep_states)
        return output, states if kept is None else [State(*kept, eps, key_max)]
    for images in _images(key, passes):
        q, k, v, out, mask = (_of_images(x, images) for x in (query, key, value, output, key_mask))
        if not keep_states and _is_short(q, k, v, passes):
            _quadratic(q, k, v, out, mask, passes)
            continue
        state = _reduce_keys(k, v, mask, passes)
        for tokens in _tokens(q, passes):
            features, _ = passes.query_features(_of_tokens(q, tokens), state.normalizer, state.eps, state.key_max)
            _product(features, state.state, _of_tokens(out, tokens))
        if keep_states:
            states.append(state)
    return output, states


def _reduce_keys(key: Tensor, value: Tensor, key_mask: Tensor | None, passes: TorchPasses) -> State:
    eps, key_max = _sum_of_eps(key, key_mask, passes), _largest_key(key, key_mask, passes)
    normalizer = eps.new_zeros(len(eps), 1, passes.num_features(key.shape[-1]))
    state = None
    for tokens in _tokens(key, passes):
        features = passes.key_features(_of_tokens(key, tokens), _of_tokens(key_mask, tokens), key_max, normalizer)
        part = torch.bmm(features.mT, passes.by_head(_of_tokens(value, tokens)))
        state = part if state is None else state.to(eps.dtype).add_(part)
    if state is None:  # no keys
        state = value.new_zeros(len(eps), normalizer.shape[-1], value.shape[-1])
    return State(state.to(value.dtype), normalizer, eps, key_max)


def _backward(
    inputs: list[Tensor], gradient: Tensor, gradients: list[Tensor], state: State, passes: TorchPasses
) -> None:
    """Writes the gradients of some images' queries, keys and values, which are float32 or float64 here."""
    (query, key, value, key_mask), (query_gradient, key_gradient, value_gradient) = inputs, gradients
    of_state, of_normalizer = torch.zeros_like(state.state), torch.zeros_like(state.normalizer)
    for tokens in _tokens(query, passes):
        block, incoming = _of_tokens(query, tokens), passes.by_head(_of_tokens(gradient, tokens))
        features, inverse = passes.query_features(block, state.normalizer, state.eps, state.key_max)
        of_state += torch.bmm(features.mT, incoming)
        products = torch.bmm(incoming, state.state.mT)
        out = _of_tokens(query_gradient, tokens)
        passes.query_gradient(features, inverse, products, state.normalizer, of_normalizer, out)
    for tokens in _tokens(key, passes):
        mask = _of_tokens(key_mask, tokens)
        features = passes.key_features(_of_tokens(key, tokens), mask, state.key_max)
        _product(features, of_state, _of_tokens(value_gradient, tokens))
        products = torch.bmm(passes.by_head(_of_tokens(value, tokens)), of_state.mT)
        passes.key_gradient(features, products, of_normalizer, mask, _of_tokens(key_gradient, tokens))


def _quadratic(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, key_mask: Tensor | None, passes: TorchPasses
) -> None:
    """Writes the output for few tokens, through their weights."""
    eps, key_max = _sum_of_eps(key, key_mask, passes), _largest_key(key, key_mask, passes)
    normalizer = eps.new_zeros(len(eps), 1, passes.num_features(key.shape[-1]))
    phi_k = passes.key_features(key, key_mask, key_max, normalizer)
    phi_q, _ = passes.query_features(query, normalizer, eps, key_max)
    _product(torch.bmm(phi_q, phi_k.mT), passes.by_head(value), out)


def _is_short(query: Tensor, key: Tensor, value: Tensor, passes: TorchPasses) -> bool:
    """Whether the weights cost less than the state, and all tokens of an image are one block."""
    query_tokens, tokens, num_features = query.shape[2], key.shape[2], passes.num_features(key.shape[-1])
    by_weights = query_tokens * tokens * (num_features + value.shape[-1])
    by_state = (query_tokens + tokens) * num_features * value.shape[-1]
    return by_weights < by_state and tokens <= _step(key, passes)


def _sum_of_eps(key: Tensor, key_mask: Tensor | None, passes: TorchPasses) -> Tensor:
    """eps times the number of real tokens, or times 1 where there are none: `(batch * heads, 1, 1)`."""
    dtype, heads = accumulation_dtype(key), key.shape[1]
    if key_mask is None:
        return torch.full((key.shape[0] * heads, 1, 1), passes.eps * max(key.shape[2], 1), dtype=dtype)
    count = key_mask.sum(dim=1, dtype=dtype).clamp(min=1)
    return (count * passes.eps).repeat_interleave(heads)[:, None, None]


def _largest_key(key: Tensor, key_mask: Tensor | None, passes: TorchPasses) -> Tensor | None:
    if passes.nonlinearity != "exp":
        return None
    largest = largest_key(key, key_mask).to(accumulation_dtype(key)) * passes.scale
    # finite where every key is padding
    return largest.clamp(min=torch.finfo(largest.dtype).min / 2).flatten(0, 1).contiguous()


def _step(x: Tensor, passes: TorchPasses) -> int:
    """Tokens in a block."""
    return max(BLOCK_NUMEL // max(x.shape[1] * passes.num_features(x.shape[-1]), 1), 64)


def _images(key: Tensor, passes: TorchPasses) -> list[slice]:
    """Which images go together."""
    return _slices(key.shape[0], max(_step(key, passes) // max(key.shape[2], 1), 1))


def _tokens(x: Tensor, passes: TorchPasses) -> list[slice]:
    """The tokens of each block."""
    return _slices(x.shape[2], _step(x, passes))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def _of_images(x: Tensor | None, images: slice) -> Any:
    return x if x is None or images.stop - images.start == len(x) else x[images]


def _of_tokens(x: Tensor | None, tokens: slice) -> Any:
    """Tokens of `(batch, heads, tokens, dim)`, or of a mask `(batch, tokens)`."""
    if x is None:
        return None
    axis = 1 if x.ndim == 2 else 2
    return (
        x if tokens.stop - tokens.start == x.shape[axis] else x.narrow(axis, tokens.start, tokens.stop - tokens.start)
    )


def _empty(x: Tensor, dim: int) -> Tensor:
    """`(batch, heads, tokens, dim)` as a view of `(batch, tokens, heads, dim)` memory, which is how layers read it."""
    batch, heads, tokens, _ = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Writes the products of `(batch * heads, ...)` matrices to `(batch, heads, ...)`."""
    if len(out) == 1 and out.dtype == torch.bfloat16:
        torch.bmm(a, b, out=out[0])  # oneDNN writes where it shall; MKL, in float32, is slower at it than a copy
    else:
        out.copy_(torch.bmm(a, b).view(out.shape))


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the products, rows without gaps, and negated where PyTorch has left that for later."""
    x = x.to(dtype).resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()
