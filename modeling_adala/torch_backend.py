"""Linear attention in PyTorch, in one piece: for autograd, compilers and every device.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

import torch
from torch import Tensor

from .feature_maps import FeatureMap, accumulation_dtype


def linear_attention_torch(
    query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap, key_mask: Tensor | None, eps: float
) -> Tensor:
    """See `linear_attention`. Differentiable, twice too; compiles and exports. Keeps the features of all tokens.

    Features, state, normalizer, products and division are float32 whatever the input (float64 if it is).
    """
    dtype, output_dtype = accumulation_dtype(query), value.dtype
    # one by one: rotary positions leave query and key in float32 where autocast has value in bfloat16
    query, key, value = (_cast(x, dtype) for x in (query, key, value))
    phi_q, phi_k = feature_map(query, key, key_mask)
    phi_k, count = mask_keys(phi_k, key_mask)
    normalizer = phi_k.sum(dim=2) / count
    state = _matmul(phi_k.transpose(2, 3), value) / count[..., None]
    # one product gives numerator and normalizer
    output = _matmul(phi_q, torch.cat((state, normalizer[..., None]), dim=-1))
    output = output[..., :-1] / (output[..., -1:] + eps)
    output = output.transpose(1, 2).to(output_dtype, memory_format=torch.contiguous_format)
    return output.contiguous().transpose(1, 2)  # `to` alone leaves a tensor that has the dtype already as it is


def mask_keys(phi_k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeroes the features of padding and counts the real tokens, as `(batch or 1, 1, 1)`."""
    if key_mask is None:
        return phi_k, (phi_k.new_ones(1, 1, 1) * phi_k.shape[2]).clamp(min=1)
    count = key_mask.sum(dim=1).clamp(min=1).to(phi_k.dtype)[:, None, None]
    return phi_k.masked_fill(~key_mask[:, None, :, None], 0), count


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # the cast writes a new tensor anyway: in the layout that one batched product takes
    return x if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` over `(batch, heads)` without a copy of either.

    `torch.matmul` would first copy (B, H, N, D) views of (B, N, H, D) memory, whose batch strides do not merge into
    one. Head by head they do.
    """
    if all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in (a, b)):
        return torch.matmul(a, b)
    heads = [torch.bmm(x, y) for x, y in zip(a.unbind(1), b.unbind(1), strict=True)]
    return torch.stack(heads, dim=2).transpose(1, 2)
