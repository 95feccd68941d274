"""Query, key and value as one product, with the projection of a learned feature map folded in. For inference.

A learned map computes phi(x W_h) of each head's x = y W_q + b_q. Both steps are linear, so that y (W_q W_h) + b_q W_h
gives the same in one, exactly; the scale goes in, too. Centering keys subtracts a mean, which commutes with W_h, but
takes a bias of the map away with it: such a map (`t2r` with `center_keys`) is not folded. Nor is one behind rotary
positions (DINOv3), which come between W_q and W_h.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UsageError
from .feature_maps import FeatureMap, accumulation_dtype, must_run_whole
from .surgery import Snapshot, is_plain, put_in_front, take_away
from .upstream import ALL_ATTENTION_FUNCTIONS, apply_rotary_pos_emb

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def fuse(module: Any) -> None:
    """Makes an attention module use one product; see `AdaLAMixin.fuse_qkv_projections`."""
    put_in_front(FusedProjections, module)
    module._fuse()


def unfuse(module: nn.Module) -> None:
    """Undoes `fuse`."""
    if isinstance(module, FusedProjections):
        take_away(FusedProjections, module)
        for name in ("qkv_weight", "qkv_bias", "folded_feature_map", "_fused_from"):
            delattr(module, name)


def check_fusible(name: str, module: Any) -> None:
    """Raise `UsageError` if a projection or the feature map computes anything that its weights do not tell."""
    parts: list[tuple[str, Any]] = [(projection, _is_linear) for projection in PROJECTIONS]
    if module.feature_map is not None and module.feature_map.learned:
        parts.append(("feature_map", _is_foldable))
    for part, is_ordinary in parts:
        submodule = getattr(module, part)
        if not is_ordinary(submodule) or not all(is_plain(x) and not x.is_meta for x in submodule.parameters()):
            raise UsageError(
                f"{name}.{part} is more than its weights (an adapter, a quantized or an off-loaded layer, a hook), so"
                " it cannot become part of a fused product; merge adapters first (model.merge_and_unload())."
            )


class FoldedFeatureMap(FeatureMap):
    """What is left of a learned map when its projection is part of the weights before it."""

    def __init__(self, feature_map: Any):
        super().__init__(feature_map.num_heads, feature_map.feature_dim, 1.0, feature_map.center_keys)
        self.nonlinearity, self.eps = feature_map.nonlinearity, feature_map.eps


class FusedProjections:
    """In front of a stock attention class. Parameters stay where they were; what is fused is in no `state_dict`."""

    feature_map: Any
    folded_feature_map: FoldedFeatureMap | None
    v_proj: nn.Linear
    training: bool
    config: Any
    register_buffer: Any

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if not self._may_use_fused():
            return super().forward(hidden_states, attention_mask, **kwargs)
        heads = self.v_proj.out_features // self.head_dim
        features = (self.qkv_weight.shape[0] - self.v_proj.out_features) // 2
        fused = F.linear(hidden_states, self.qkv_weight, self.qkv_bias)
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in fused.split((features, features, self.v_proj.out_features), dim=-1)
        )
        rotary = kwargs.pop("position_embeddings", None)
        if rotary is not None:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        if self.folded_feature_map is not None:
            kwargs["feature_map"] = self.folded_feature_map
        attend = ALL_ATTENTION_FUNCTIONS["adala"]
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        project = self.o_proj if hasattr(self, "o_proj") else self.out_proj
        return project(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def train(self, mode=True):
        # code that writes through `.data`, which nothing counts, calls `eval` before it evaluates
        self._fused_from = Snapshot(())
        return super().train(mode)

    def _may_use_fused(self) -> bool:
        # another implementation sees queries and keys without a feature map's projection in them
        if self.training or torch.is_grad_enabled() or self.config._attn_implementation != "adala":
            return False
        if not all(_is_linear(getattr(self, name)) for name in PROJECTIONS):
            return False  # adapters or hooks have come since
        if self.folded_feature_map is not None and not _is_foldable(self.feature_map):
            return False
        # a compiler can neither look nor compute anew
        if not torch.compiler.is_compiling() and not self._fused_from.is_of(self._sources()):
            self._fuse()
        return True

    def _sources(self) -> Iterator[Tensor | None]:
        for name in PROJECTIONS:
            projection = getattr(self, name)
            yield from (projection.weight, projection.bias)
        if self.folded_feature_map is not None:
            phi = self.feature_map
            yield from (phi.weight_q, phi.weight_k, phi.bias_q, phi.bias_k)

    @torch.no_grad()
    def _fuse(self) -> None:
        parts: list[Any] = [(getattr(self, name).weight, getattr(self, name).bias) for name in PROJECTIONS]
        self.folded_feature_map = FoldedFeatureMap(self.feature_map) if self._may_fold() else None
        if self.folded_feature_map is not None:
            phi = self.feature_map
            parts[0] = _folded(*parts[0], phi.weight_q * phi.scale, phi.bias_q)
            parts[1] = _folded(*parts[1], phi.weight_k * phi.scale, phi.bias_k)
        weight, bias = torch.cat([weight for weight, _ in parts]), None
        if any(bias is not None for _, bias in parts):
            bias = torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts])
        self.register_buffer("qkv_weight", weight, persistent=False)
        self.register_buffer("qkv_bias", bias, persistent=False)
        self._fused_from = Snapshot(self._sources())

    def _may_fold(self):
        phi = self.feature_map
        if phi is None or not phi.learned or (phi.center_keys and phi.use_bias):
            return False
        return "position_embeddings" not in signature(super().forward).parameters


def _folded(
    weight: Tensor, bias: Tensor | None, projection: Tensor, projection_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`weight` `(heads * head_dim, channels)` and `bias`, followed by `projection` `(heads, head_dim, features)`."""
    heads, head_dim, _ = projection.shape
    dtype = accumulation_dtype(weight)
    projection = projection.to(dtype)
    folded = torch.einsum("hdf,hdc->hfc", projection, weight.to(dtype).view(heads, head_dim, -1)).flatten(0, 1)
    if bias is not None:
        bias = torch.einsum("hdf,hd->hf", projection, bias.to(dtype).view(heads, head_dim)).flatten()
    if projection_bias is not None:
        bias = projection_bias.flatten() + (0 if bias is None else bias)
    return folded.to(weight.dtype), None if bias is None else bias.to(weight.dtype)


def _is_linear(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) is nn.Linear and not hooks and "forward" not in module.__dict__


def _is_foldable(feature_map: nn.Module) -> bool:
    return not must_run_whole(feature_map)
