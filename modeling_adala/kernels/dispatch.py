"""Calls that the kernels take, and those that they leave to PyTorch."""

import functools
import logging

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from ..feature_maps import FeatureMap, check_mapped, softmax_pair
from ..upstream import is_transformed
from .triton_backend import linear_attention_triton, unsupported

logger = logging.getLogger(__name__)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """Return the output of the Triton kernels, or `None`, with a warning, for a call that they do not support.

    Arguments are those of `modeling_adala.linear_attention`, checked.
    """
    # kernels have one derivative, a feature map with hooks must run, and the mean key of a pack is that of no image
    if must_run_whole(feature_map) or _is_transformed(query, key, value):
        return None
    if cu_seqlens is not None and feature_map.center_keys:
        return None
    mapped_query, mapped_key, scale = feature_map.affine(query, key, key_mask)
    check_mapped(feature_map, (query, key), (mapped_query, mapped_key))
    query, key, nonlinearity = mapped_query, mapped_key, feature_map.nonlinearity
    if nonlinearity == "softmax_pair":  # no kernel has room for it: its features are twice as many as its inputs
        if scale != 1.0:  # a learned map has put it into its weights
            query, key, scale = query * scale, key * scale, 1.0
        query, key, nonlinearity = softmax_pair(query), softmax_pair(key), "identity"
    obstacle = unsupported(query, key, value, nonlinearity)
    if obstacle is None:
        return linear_attention_triton(query, key, value, nonlinearity, scale, key_mask, eps, cu_seqlens)
    if not torch.compiler.is_compiling():
        _warn_unsupported(obstacle)
    return None


def must_run_whole(feature_map: nn.Module) -> bool:
    """Return whether to call a feature map as a module, and not its affine part alone.

    Hooks wait for it to run (those of accelerate, which fetch off-loaded weights, replace `forward`), or its class has
    a `forward` of its own, as wrappers do.
    """
    hooks = feature_map._forward_hooks or feature_map._forward_pre_hooks
    hooks = hooks or feature_map._backward_hooks or feature_map._backward_pre_hooks
    # by name: `trust_remote_code` brings a second class of that name
    own_forward = type(feature_map).forward.__qualname__ != "FeatureMap.forward"
    return bool(hooks) or own_forward or "forward" in feature_map.__dict__


def _is_transformed(*tensors: Tensor) -> bool:
    """Return whether `torch.func` or forward-mode derivatives need to see each operation."""
    if torch.compiler.is_compiling():
        return False
    return is_transformed() or any(unpack_dual(x).tangent is not None for x in tensors)


@functools.cache
def _warn_unsupported(obstacle: str) -> None:
    """Warn, once per case, that the kernels leave a call to PyTorch."""
    logger.warning("backend 'triton' does not support %s; PyTorch runs it.", obstacle)
