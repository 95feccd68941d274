"""Non-causal linear attention: the operator and its quadratic twin.

Canonical form (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5), with the state written as a mean over the tokens:

    S = (1/N) phi(K)^T V        z = (1/N) phi(K)^T 1        out_i = phi(q_i) S / (phi(q_i) z + eps)

`linear_attention` costs O(N); `linear_attention_reference` computes the same from the N x N weights. It is the
documentation, the oracle of the tests and what draws attention maps.

Kernels and the check of arguments are taken from the installed package, where there is one; a checkpoint's copy of
this file runs PyTorch alone, for the models beside it.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .feature_maps import FeatureMap, accumulation_dtype, check_mapped

try:
    from modeling_adala import kernels
except ImportError:
    kernels = None  # type: ignore[assignment]


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap | str,
    key_mask: Tensor | None = None,
    eps: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return linear attention, in O(N) time and memory. Reads strided views as they come, without a copy.

    Features, state, normalizer and division are float32 for any input (float64 if it is), also under autocast. Kernels
    may multiply 16-bit inputs in 16 bits; see theirs for what that means.

    Args:
        query (`Tensor`): `(batch, heads, query_tokens, head_dim)`, any strides; float16, bfloat16, float32 or float64,
            as key and value, which may be of another one of these.
        key (`Tensor`): `(batch, heads, tokens, head_dim)`.
        value (`Tensor`): `(batch, heads, tokens, value_dim)`.
        feature_map (`FeatureMap` or `str`): phi, or the name of one in `FEATURE_MAPS` that has no parameters.
        key_mask (`Tensor`, *optional*): `(batch, tokens)`, True (or 1, in any integer or float dtype) for real tokens.
            An image without any gets zeros. Values other than 0 and 1 are refused, except while a compiler traces.
        eps (`float`, *optional*): Added to the normalizer. Default: the feature map's, 1e-6 to its power.
        cu_seqlens (`Tensor`, *optional*): `(sequences + 1,)`, integers, for images of different sizes packed into a
            batch of one: where each begins, and the number of tokens at the end. Tokens attend within their own image.
        backend (`str`, *optional*): One of `BACKENDS`. Default: see `choose_backend`.

    Returns:
        `Tensor`: `(batch, heads, query_tokens, value_dim)` in the dtype of `value`, a view of `(batch, query_tokens,
        heads, value_dim)` memory, which is how an output projection reads it.

    Raises:
        UsageError: for an unknown backend, shapes, dtypes or devices that do not fit each other or the feature map, a
            `key_mask` of anything but 0 and 1, and `cu_seqlens` with a batch, or that do not fit the tokens.

    Example:

    ```python
    query, key, value = torch.randn(3, 2, 12, 197, 64)
    output = linear_attention(query, key, value, "elu")
    ```
    """
    if kernels is not None:
        feature_map, key_mask, eps = kernels.checked(feature_map, key_mask, eps, query=query, key=key, value=value)
        cu_seqlens = kernels.checked_bounds(cu_seqlens, query, key)
    eps = feature_map.eps if eps is None else eps
    name = (backend or "torch") if kernels is None else kernels.choose_backend(query.device.type, backend).name
    attend = _from_weights if name == "reference" else _in_pytorch
    with _no_autocast(query):
        output = None
        if name == "triton":
            output = kernels.linear_attention(query, key, value, feature_map, key_mask, eps, cu_seqlens)
        if output is not None:
            return output
        if cu_seqlens is None or key.shape[2] == 0:
            return attend(query, key, value, feature_map, key_mask, eps)
        outputs = []  # image by image
        for first, last in pairwise(cu_seqlens.tolist()):
            if last > first:
                q, k, v = (x[:, :, first:last] for x in (query, key, value))
                mask = None if key_mask is None else key_mask[:, first:last]
                outputs.append(attend(q, k, v, feature_map, mask, eps).transpose(1, 2))
        return torch.cat(outputs, dim=1).transpose(1, 2)


def linear_attention_reference(*args: Any, **kwargs: Any) -> Tensor:
    """Return what `linear_attention` returns for the same arguments, from the explicit weights, O(N^2)."""
    return linear_attention(*args, **kwargs, backend="reference")


def attention_weights(
    query: Tensor, key: Tensor, feature_map: FeatureMap | str, key_mask: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Return the weights that linear attention applies, `(batch, heads, query_tokens, tokens)`."""
    if kernels is not None:
        feature_map, key_mask, eps = kernels.checked(feature_map, key_mask, eps, query=query, key=key)
    eps = feature_map.eps if eps is None else eps
    with _no_autocast(query):
        return _weights(query, key, feature_map, key_mask, eps)


def _in_pytorch(
    query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap, key_mask: Tensor | None, eps: float
) -> Tensor:
    """Linear attention in one piece, for autograd (twice, too), compilers, exporters and every device.

    Features, state, normalizer, products and division are float32 (float64 if the input is).
    """
    dtype, output_dtype = accumulation_dtype(query), value.dtype
    # one by one: rotary positions leave query and key in float32 where autocast has value in bfloat16
    query, key, value = (_cast(x, dtype) for x in (query, key, value))
    phi_q, phi_k, count = _features(query, key, feature_map, key_mask)
    # sums in the place of means, and eps times the count: the same quotient in fewer passes
    normalizer = (phi_q * phi_k.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True) + eps * count
    output = _matmul(phi_q, _matmul(phi_k.transpose(2, 3), value)) / normalizer
    output = output.transpose(1, 2).to(output_dtype, memory_format=torch.contiguous_format)
    return output.contiguous().transpose(1, 2)  # `to` alone leaves a tensor that has the dtype already as it is


def _features(
    query: Tensor, key: Tensor, feature_map: FeatureMap, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Return the features of queries and keys, those of padding zero, and the count of real tokens, at least 1."""
    phi_q, phi_k = feature_map(query, key, key_mask)
    check_mapped(feature_map, (query, key), (phi_q, phi_k))
    if key_mask is None:
        return phi_q, phi_k, phi_k.shape[2] or 1
    count = key_mask.sum(dim=1).clamp(min=1).to(phi_k.dtype)[:, None, None, None]
    return phi_q, phi_k.masked_fill(~key_mask[:, None, :, None], 0), count


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # the cast writes a new tensor anyway: in the layout that one batched product takes
    return x if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` over `(batch, heads)` without a copy of either.

    `torch.matmul` would first copy (B, H, N, D) views of (B, N, H, D) memory, whose batch strides do not merge into
    one. Head by head they do. An exported graph has no strides, and heads of its own would only lengthen it.
    """
    if torch.compiler.is_exporting() or all(x.size(0) == 1 or x.stride(0) == x.size(1) * x.stride(1) for x in (a, b)):
        return torch.matmul(a, b)
    heads = [torch.bmm(x, y) for x, y in zip(a.unbind(1), b.unbind(1), strict=True)]
    return torch.stack(heads, dim=2).transpose(1, 2)


def _from_weights(
    query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap, key_mask: Tensor | None, eps: float
) -> Tensor:
    """Linear attention in the quadratic form that defines it."""
    weights = _weights(query, key, feature_map, key_mask, eps)
    return (weights @ value.to(weights.dtype)).to(value.dtype)


def _weights(query: Tensor, key: Tensor, feature_map: FeatureMap, key_mask: Tensor | None, eps: float) -> Tensor:
    dtype = accumulation_dtype(query)
    phi_q, phi_k, count = _features(query.to(dtype), key.to(dtype), feature_map, key_mask)
    scores = phi_q @ phi_k.transpose(2, 3)
    return scores / (scores.sum(dim=-1, keepdim=True) + eps * count)


def _no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context with autocast off, where the device has one ("meta" has none)."""
    device = x.device.type
    # `torch.amp.is_autocast_available` would say the same, and break the graph of torch.compile before PyTorch 2.11
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
