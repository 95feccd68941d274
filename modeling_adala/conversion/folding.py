"""Learned feature maps folded into the projections of queries and keys, once a student is trained."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..configuration_adala import vision_config
from ..families import get_family
from ..feature_maps import FEATURE_MAPS
from ..inspection.towers import attention_modules

FOLDED = {"hedgehog": "softmax_pair", "power": "relu", "t2r": "relu"}
"""Maps that begin with a projection, and what they are without it."""


@torch.no_grad()
def fold_feature_maps(model: PreTrainedModel) -> bool:
    """Turn the learned maps of a student into those of `FOLDED`, in place, and return whether one folds.

    Their products become part of the projections of queries and keys, so that the outputs are the same up to rounding
    and take two products less per layer; softmax in its place ("sdpa") no longer is the teacher's. Stages 2 and 3 end
    with it.

    Maps are left as they are where something acts between projection and map (rotary positions of DINOv3,
    `center_keys`), where a map has a bias and a projection has none, and where there are more or fewer features than
    `head_dim`.

    Args:
        model (`PreTrainedModel`): Student, whole on its device.

    Example:

    ```python
    student = convert("facebook/dinov2-small", feature_map="t2r")
    fold_feature_maps(student)
    assert student.config.feature_map == "relu"
    ```
    """
    folded = FOLDED.get(vision_config(model.config).feature_map)
    modules: list[Any] = [module for module in attention_modules(model) if module.feature_map is not None]
    if folded is None or get_family(model.config.model_type).rotary or not modules or not all(map(_folds, modules)):
        return False
    power = modules[0].feature_map.power
    kept = {} if power == 1 else {"power": power}
    for module in modules:
        phi = module.feature_map
        _fold(module.q_proj, phi.weight_q * phi.scale, phi.bias_q)
        _fold(module.k_proj, phi.weight_k * phi.scale, phi.bias_k)
        module.feature_map = FEATURE_MAPS[folded](phi.num_heads, phi.head_dim, **kept)
    for config in (vision_config(model.config), *(module.config for module in modules)):
        config.feature_map, config.feature_map_kwargs = folded, dict(kept)
    return True


def _folds(module: Any) -> bool:
    phi = module.feature_map
    biases = phi.bias_q is None or not (module.q_proj.bias is None or module.k_proj.bias is None)
    return biases and phi.feature_dim == phi.head_dim and not phi.center_keys


def _fold(projection: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Fold `(heads, head_dim, features)` and `(heads, 1, features)` into a projection whose rows are its outputs."""
    weight, heads = weight.double(), weight.shape[0]
    rows = torch.einsum("hdf,hdc->hfc", weight, projection.weight.double().unflatten(0, (heads, -1)))
    projection.weight.copy_(rows.flatten(0, 1))
    if projection.bias is not None:
        shift = torch.einsum("hdf,hd->hf", weight, projection.bias.double().unflatten(0, (heads, -1)))
        projection.bias.copy_((shift if bias is None else shift + bias[:, 0]).flatten())
