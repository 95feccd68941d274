"""Non-causal linear attention: the operator and its quadratic twin.

Canonical form (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5), with the state written as a mean over the tokens:

    S = (1/N) phi(K)^T V        z = (1/N) phi(K)^T 1        out_i = phi(q_i) S / (phi(q_i) z + eps)

`linear_attention` costs O(N); `linear_attention_reference` computes the same from the N x N weights. It is the
documentation, the oracle of the tests and what draws attention maps.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor

from .backends import choose_backend, warn_unsupported
from .cpu_backend import linear_attention_cpu
from .errors import UsageError
from .feature_maps import FeatureMap, accumulation_dtype, softmax_pair
from .torch_backend import linear_attention_torch, mask_keys
from .triton_backend import linear_attention_triton, unsupported
from .upstream import is_in_torch_dispatch_mode, is_transformed


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None = None,
    eps: float | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear attention in O(N) time and memory. Reads strided views as they come: no copy of query, key or value.

    Features, state, normalizer and division are float32 whatever the input (float64 if it is), also under autocast.
    Backends may multiply 16-bit inputs in 16 bits; see theirs for what that means.

    Args:
        query (`Tensor`): `(batch, heads, query_tokens, head_dim)`, any strides.
        key (`Tensor`): `(batch, heads, tokens, head_dim)`.
        value (`Tensor`): `(batch, heads, tokens, value_dim)`.
        feature_map (`FeatureMap`): phi.
        key_mask (`Tensor`, *optional*): `(batch, tokens)`, True for real tokens. An image without any gets zeros.
        eps (`float`, *optional*): Added to the normalizer. Default: the feature map's own, 1e-6 (1e-12 for `exp`).
        cu_seqlens (`Tensor`, *optional*): `(sequences + 1,)`, int32, for images of different sizes packed into a batch
            of one: where each begins, and the number of tokens at the end. Tokens attend within their own image.
        backend (`str`, *optional*): One of `BACKENDS`. Default: see `choose_backend`.

    Returns:
        `Tensor`: `(batch, heads, query_tokens, value_dim)` in the dtype of `value`, a view of `(batch, query_tokens,
        heads, value_dim)` memory, which is how an output projection reads it.

    Raises:
        UsageError: for an unknown backend, or `cu_seqlens` with a batch, or that does not fit the tokens.
    """
    eps = feature_map.eps if eps is None else eps
    name = choose_backend(query.device.type, backend).name
    if cu_seqlens is not None and (name != "triton" or feature_map.center_keys):
        return _one_by_one(query, key, value, feature_map, key_mask, eps, cu_seqlens, backend)
    with _no_autocast(query):
        if _is_watched(feature_map):
            return linear_attention_torch(query, key, value, feature_map, key_mask, eps)
        if name == "triton":
            output = _by_triton(query, key, value, feature_map, key_mask, eps, cu_seqlens)
            if output is not None:
                return output
        # compilers fuse what they can see; a CPU that is not compiled for is served best in blocks
        if query.device.type == "cpu" and not torch.compiler.is_compiling() and _is_plain(query, key, value):
            query, key, scale = feature_map.affine(query, key, key_mask)
            nonlinearity, compiled = feature_map.nonlinearity, name == "cpu"
            return linear_attention_cpu(query, key, value, nonlinearity, scale, key_mask, eps, compiled)
        return linear_attention_torch(query, key, value, feature_map, key_mask, eps)


def linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """The same as `linear_attention` from the explicit weights, O(N^2). Arguments and result are the same."""
    weights = attention_weights(query, key, feature_map, key_mask, eps)
    return (weights @ value.to(weights.dtype)).to(value.dtype)


def attention_weights(
    query: Tensor, key: Tensor, feature_map: FeatureMap, key_mask: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The weights that linear attention applies, `(batch, heads, query_tokens, tokens)`: rows sum to just below 1."""
    eps = feature_map.eps if eps is None else eps
    with _no_autocast(query):
        dtype = accumulation_dtype(query)
        phi_q, phi_k = feature_map(query.to(dtype), key.to(dtype), key_mask)
        phi_k, count = mask_keys(phi_k, key_mask)
        scores = phi_q @ phi_k.transpose(2, 3) / count[..., None]
        return scores / (scores.sum(dim=-1, keepdim=True) + eps)


def _by_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """The Triton kernels' output; `None` for what they do not support."""
    query, key, scale = feature_map.affine(query, key, key_mask)
    nonlinearity = feature_map.nonlinearity
    if nonlinearity == "softmax_pair":  # no kernel has room for it: its features are twice as many as its inputs
        query, key, nonlinearity = softmax_pair(query * scale), softmax_pair(key * scale), "identity"
        scale = 1.0
    obstacle = unsupported(query, key, value, nonlinearity, key_mask, cu_seqlens)
    if obstacle is None:
        return linear_attention_triton(query, key, value, nonlinearity, scale, key_mask, eps, cu_seqlens)
    if not torch.compiler.is_compiling():
        warn_unsupported("triton", obstacle)
    return None


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None,
    eps: float,
    cu_seqlens: Tensor,
    backend: str | None,
) -> Tensor:
    """Packed images without a kernel for them."""
    bounds = cu_seqlens.tolist()
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise UsageError(
            f"cu_seqlens packs images into a batch of one, but query is {tuple(query.shape)} and key"
            f" {tuple(key.shape)}; lay the tokens of all images one after another."
        )
    if bounds[0] != 0 or bounds[-1] != key.shape[2] or sorted(bounds) != bounds:
        raise UsageError(f"cu_seqlens={bounds} must rise from 0 to the number of tokens, {key.shape[2]}.")
    outputs = []
    for first, last in pairwise(bounds):
        if last > first:
            q, k, v = (x[:, :, first:last] for x in (query, key, value))
            mask = None if key_mask is None else key_mask[:, first:last]
            outputs.append(linear_attention(q, k, v, feature_map, mask, eps, backend=backend).transpose(1, 2))
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _no_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast switched off, where the device has one ("meta" has none)."""
    device = x.device.type
    # `torch.amp.is_autocast_available` would say the same, and break the graph of torch.compile before PyTorch 2.11
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _is_watched(feature_map: FeatureMap) -> bool:
    """Whether somebody's hooks wait for the feature map to run."""
    return bool(feature_map._forward_hooks or feature_map._forward_pre_hooks)


def _is_plain(*tensors: Tensor) -> bool:
    """Whether these are numbers in memory, no stand-ins of a tracer or of `torch.func`, and no mode such as a FLOP
    counter waits to see each operation."""
    return (
        all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        and not is_transformed()
        and not is_in_torch_dispatch_mode()
    )
