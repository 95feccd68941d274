"""Methods that benchmarks/quality.py compares: options of linear attention, and settings of stages 1 and 2."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """Row of the comparison.

    Args:
        about (`str`): What it is, for the table.
        options (`dict`): As for `convert`.
        stage_1 (`dict`), stage_2 (`dict`): Settings of `AttentionAlignmentConfig` and `FeatureAlignmentConfig`, on
            top of those of the protocol.
        auto (`int`): Softmax layers that are chosen after stage 1, by measurement.
    """

    about: str
    options: dict[str, Any] = field(default_factory=dict)
    stage_1: dict[str, Any] = field(default_factory=dict)
    stage_2: dict[str, Any] = field(default_factory=dict)
    auto: int = 0


# stage 2 as it was before its learning rates were measured
SLOW = {"learning_rate": 5e-5, "new_learning_rate": 5e-5}
PLAIN, MIX = {"local_mixing": 0}, {"local_mixing": 3}

METHODS = {
    "paper": Method(
        "elu + 1, final features only (the paper)", {"feature_map": "elu", **PLAIN}, stage_2={"hidden_states": []}
    ),
    "elu": Method("elu + 1", {"feature_map": "elu", **PLAIN}),
    "relu": Method("relu", {"feature_map": "relu", **PLAIN}),
    "t2r": Method("relu of a learned projection", {"feature_map": "t2r", **PLAIN}),
    "hedgehog": Method("softmax of a learned projection and of its negative", {"feature_map": "hedgehog", **PLAIN}),
    "hedgehog, 5e-5": Method("the default of 0.1.0", {"feature_map": "hedgehog", **PLAIN}, stage_2=SLOW),
    "hedgehog, centered keys": Method(
        "keys without their mean", {"feature_map": "hedgehog", "feature_map_kwargs": {"center_keys": True}, **PLAIN}
    ),
    "elu + mixing": Method("elu + 1, local mixing 3x3", {"feature_map": "elu", **MIX}),
    "relu + mixing": Method("relu, local mixing 3x3", {"feature_map": "relu", **MIX}),
    "t2r + mixing": Method("t2r, local mixing 3x3", {"feature_map": "t2r", **MIX}),
    "hedgehog + mixing": Method("hedgehog, local mixing 3x3", {"feature_map": "hedgehog", **MIX}),
    "hedgehog + mixing 5x5": Method("hedgehog, local mixing 5x5", {"feature_map": "hedgehog", "local_mixing": 5}),
    "hedgehog, auto:1": Method("hedgehog, one softmax layer", {"feature_map": "hedgehog", **PLAIN}, auto=1),
    "t2r + mixing, auto:1": Method("t2r, local mixing, one softmax layer", {"feature_map": "t2r", **MIX}, auto=1),
    "hedgehog + mixing, auto:1": Method(
        "hedgehog, local mixing, one softmax layer", {"feature_map": "hedgehog", **MIX}, auto=1
    ),
    "hedgehog + mixing, auto:2": Method(
        "hedgehog, local mixing, two softmax layers", {"feature_map": "hedgehog", **MIX}, auto=2
    ),
}
