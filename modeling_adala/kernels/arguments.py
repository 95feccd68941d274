"""The check of the operator's arguments, once, before any backend sees them.

A checkpoint's copy of the operator does without: its models bring tensors that fit.
"""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..feature_maps import FEATURE_MAPS, FeatureMap, build_feature_map
from ..upstream import is_in_torch_dispatch_mode, is_transformed

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked(
    feature_map: FeatureMap | str, key_mask: Tensor | None, eps: float | None, **tensors: Tensor
) -> tuple[FeatureMap, Tensor | None, float]:
    """Return the feature map as a module, the mask as bool, and eps; `tensors` are query, key and perhaps value."""
    _check_tensors(**tensors)
    feature_map = _checked_feature_map(feature_map, tensors["query"])
    return feature_map, _checked_mask(key_mask, tensors["key"]), _checked_eps(eps, feature_map)


def _check_tensors(**tensors: Tensor) -> None:
    """Refuse query, key and value that do not fit each other."""
    query, key = tensors["query"], tensors["key"]
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise UsageError(f"{name} is a {type(x).__name__}; pass a tensor (batch, heads, tokens, head_dim).")
        if x.ndim != 4 or x.shape[-1] == 0:
            raise UsageError(
                f"{name} of shape {tuple(x.shape)} is not (batch, heads, tokens, head_dim); split the channels of a"
                " projection into heads, and put heads before tokens."
            )
        if x.dtype not in DTYPES or x.layout != torch.strided:
            raise UsageError(
                f"{name} is {x.layout} in {x.dtype}; pass a strided tensor in float16, bfloat16, float32 or float64."
            )
        if x.device != query.device:
            raise UsageError(f"{name} is on {x.device} and query on {query.device}; move them to one device.")
        if x.shape[:2] != query.shape[:2]:
            raise UsageError(
                f"{name} of shape {tuple(x.shape)} has another batch or number of heads than query of shape"
                f" {tuple(query.shape)}; expand or repeat one of them."
            )
    if key.shape[-1] != query.shape[-1]:
        raise UsageError(
            f"key of shape {tuple(key.shape)} has another head_dim than query of shape {tuple(query.shape)}; project"
            " both to the same width."
        )
    if "value" in tensors and tensors["value"].shape[2] != key.shape[2]:
        raise UsageError(
            f"value of shape {tuple(tensors['value'].shape)} has another number of tokens than key of shape"
            f" {tuple(key.shape)}; pass one value per key."
        )


def _checked_feature_map(feature_map: FeatureMap | str, query: Tensor) -> FeatureMap:
    _, heads, _, head_dim = query.shape
    if isinstance(feature_map, str):
        built = build_feature_map(feature_map, heads, head_dim)
        if built.learned:
            raise UsageError(
                f"feature_map={feature_map!r} has weights, which a name does not bring; keep a module made by"
                f" build_feature_map({feature_map!r}, {heads}, {head_dim}) and pass it, or name one of"
                f" {', '.join(name for name, cls in FEATURE_MAPS.items() if not cls.learned)}."
            )
        return built
    if not (isinstance(feature_map, torch.nn.Module) and hasattr(feature_map, "nonlinearity")):
        raise UsageError(
            f"feature_map is a {type(feature_map).__name__}; pass a FeatureMap, such as build_feature_map('elu',"
            f" {heads}, {head_dim}), or the name of one without weights, such as 'elu'."
        )
    if feature_map.learned and (feature_map.num_heads, feature_map.head_dim) != (heads, head_dim):
        raise UsageError(
            f"feature_map is for {feature_map.num_heads} heads of {feature_map.head_dim} and query of shape"
            f" {tuple(query.shape)} has {heads} of {head_dim}; build one for these."
        )
    return feature_map


def _checked_mask(key_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """Return the mask as bool."""
    if key_mask is None:
        return None
    _check_companion("key_mask", key_mask, key)
    expected = (key.shape[0], key.shape[2])
    if key_mask.ndim != 2 or (key_mask.shape[0], key_mask.shape[1]) != expected:
        raise UsageError(
            f"key_mask of shape {tuple(key_mask.shape)} must be {expected}, the batch and the tokens of key; expand a"
            " mask that all images share."
        )
    if key_mask.dtype == torch.bool:
        return key_mask
    if key_mask.is_complex() or (_has_values(key_mask) and not ((key_mask == 0) | (key_mask == 1)).all()):
        raise UsageError(
            f"key_mask in {key_mask.dtype} has other values than 1 for real tokens and 0 for padding; turn a bias of 0"
            " and -inf into `bias == 0`."
        )
    return key_mask.to(torch.bool)


def checked_bounds(cu_seqlens: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return the bounds of packed images as int32, without gaps."""
    if cu_seqlens is None:
        return None
    _check_companion("cu_seqlens", cu_seqlens, key)
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise UsageError(
            f"cu_seqlens packs images into a batch of one, but query is {tuple(query.shape)} and key"
            f" {tuple(key.shape)}; lay the tokens of all images one after another."
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UsageError(
            f"cu_seqlens in {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)} must be int32 or int64 and of shape"
            " (images + 1,)."
        )
    if _has_values(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[:1] != [0] or bounds[-1] != key.shape[2] or sorted(bounds) != bounds:
            raise UsageError(f"cu_seqlens={bounds} must rise from 0 to the number of tokens, {key.shape[2]}.")
    return cu_seqlens.to(torch.int32).contiguous()


def _checked_eps(eps: float | None, feature_map: FeatureMap) -> float:
    eps = feature_map.eps if eps is None else eps
    if not torch.compiler.is_compiling() and not (isinstance(eps, Real) and math.isfinite(eps) and eps >= 0):
        raise UsageError(f"eps={eps!r} must be a number from 0 on, such as 1e-6.")
    return eps


def _check_companion(name: str, x: Any, key: Tensor) -> None:
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        kind = str(x.layout) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise UsageError(f"{name} is {kind}; pass a strided tensor.")
    if x.device != key.device:
        raise UsageError(f"{name} is on {x.device} and key on {key.device}; move it there.")


def _has_values(x: Tensor) -> bool:
    """Return whether the values of a tensor may be looked at: not while a compiler or a CUDA graph records."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not (x.is_meta or is_transformed() or is_in_torch_dispatch_mode())
