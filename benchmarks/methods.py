"""Methods that benchmarks/quality.py compares: options of linear attention, rivals, and settings of stages 1 and 2."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from modeling_adala import convert

from .counterparts import COUNTERPARTS, attach

OURS, BLOCK, MAP, APPROXIMATION, BOUND = KINDS = (
    "ours: local mixing, softmax layers",
    "rival blocks: more than a feature map",
    "feature maps alone",
    "approximations of softmax",
    "bounds",
)


@dataclass(frozen=True)
class Method:
    """Row of the comparison.

    Args:
        about (`str`): What it is, for the table.
        options (`dict`): As for `convert`.
        stage_1 (`dict`), stage_2 (`dict`): Settings of `AttentionAlignmentConfig` and `FeatureAlignmentConfig`, on
            top of those of the protocol.
        auto (`int`): Softmax layers that are chosen after stage 1, by measurement.
        counterpart (`str`, *optional*): Rival of `COUNTERPARTS` in the place of linear attention.
        kind (`str`): One of `KINDS`, for the table.
    """

    about: str
    options: dict[str, Any] = field(default_factory=dict)
    stage_1: dict[str, Any] = field(default_factory=dict)
    stage_2: dict[str, Any] = field(default_factory=dict)
    auto: int = 0
    counterpart: str | None = None
    kind: str = OURS

    def student(
        self, teacher: PreTrainedModel, grid: tuple[int, int], seed: int = 0, softmax_layers: list[int] | None = None
    ) -> PreTrainedModel:
        """Return an untrained student for images of `grid` patches, rows and columns."""
        student = convert(teacher, check_parity=False, softmax_layers=softmax_layers, **self.options)
        if self.counterpart is not None:
            attach(student, COUNTERPARTS[self.counterpart], grid, seed=seed)
        return student


# stage 2 as it was before its learning rates were measured
SLOW = {"learning_rate": 5e-5, "new_learning_rate": 5e-5}
PLAIN, MIX, DYNAMIC = {"local_mixing": 0}, {"local_mixing": 3}, {"local_mixing": 3, "dynamic_mixing": True}


def rival(about: str, counterpart: str, kind: str = BLOCK) -> Method:
    return Method(about, {"feature_map": "elu", **PLAIN}, counterpart=counterpart, kind=kind)


METHODS = {
    "paper": Method(
        "elu + 1, final features only (the paper)",
        {"feature_map": "elu", **PLAIN},
        stage_2={"hidden_states": []},
        kind=MAP,
    ),
    "elu": Method("elu + 1 (2006.16236)", {"feature_map": "elu", **PLAIN}, kind=MAP),
    "relu": Method("relu (EfficientViT, 2205.14756)", {"feature_map": "relu", **PLAIN}, kind=MAP),
    "t2r": Method("relu of a learned projection (2103.13076)", {"feature_map": "t2r", **PLAIN}, kind=MAP),
    "hedgehog": Method(
        "softmax of a learned projection and of its negative (2402.04347)",
        {"feature_map": "hedgehog", **PLAIN},
        kind=MAP,
    ),
    "power": Method("relu of a learned projection, to the power of 3", {"feature_map": "power", **PLAIN}, kind=MAP),
    "hedgehog, 5e-5": Method("the default of 0.1.0", {"feature_map": "hedgehog", **PLAIN}, stage_2=SLOW, kind=MAP),
    "exp": rival("element-wise exponential (2402.04347)", "exp", MAP),
    "performer": rival("FAVOR+, positive orthogonal random features (2009.14794)", "performer", MAP),
    "cosformer": rival("relu with a cosine of the distance (2202.08791)", "cosformer", MAP),
    "efficient attention": rival("two softmaxes, no normalizer (1812.01243)", "efficient", MAP),
    "relu + mixing": Method("relu, local mixing 3x3", {"feature_map": "relu", **MIX}),
    "t2r + mixing": Method("t2r, local mixing 3x3", {"feature_map": "t2r", **MIX}),
    "power + mixing": Method("power, local mixing 3x3", {"feature_map": "power", **MIX}),
    "hedgehog + mixing": Method("hedgehog, local mixing 3x3", {"feature_map": "hedgehog", **MIX}),
    "t2r + dynamic": Method("t2r, local mixing 3x3, dynamic", {"feature_map": "t2r", **DYNAMIC}),
    "power + dynamic": Method("power, local mixing 3x3, dynamic", {"feature_map": "power", **DYNAMIC}),
    "hedgehog + dynamic": Method("hedgehog, local mixing 3x3, dynamic", {"feature_map": "hedgehog", **DYNAMIC}),
    "hedgehog, auto:1": Method("hedgehog, one softmax layer", {"feature_map": "hedgehog", **PLAIN}, auto=1),
    "t2r + mixing, auto:1": Method("t2r, local mixing, one softmax layer", {"feature_map": "t2r", **MIX}, auto=1),
    "power + mixing, auto:1": Method(
        "power, local mixing, one softmax layer", {"feature_map": "power", **MIX}, auto=1
    ),
    "power + mixing, auto:2": Method(
        "power, local mixing, two softmax layers", {"feature_map": "power", **MIX}, auto=2
    ),
    "hedgehog + mixing, auto:1": Method(
        "hedgehog, local mixing, one softmax layer", {"feature_map": "hedgehog", **MIX}, auto=1
    ),
    "focused": rival("FLatten: focused features, convolution (2308.00442)", "focused"),
    "polaformer": rival("signs apart, convolution, gate (2501.15061)", "polaformer"),
    "inline": rival("subtractive normalization, dynamic convolution (2412.06590)", "inline"),
    "mala": rival("magnitude-aware weights, convolution, gate (2507.00698)", "mala"),
    "jetvit": rival("relu, dynamic convolution (2605.26636)", "jetvit"),
    "t5": rival("test-time training of a gated network, convolutions of q and k (2605.02772)", "t5"),
    "lolcats": rival("hedgehog outside of a softmax window (2410.10254)", "lolcats"),
    "nystromformer": rival("softmax through landmarks (2102.03902)", "nystromformer", APPROXIMATION),
    "monarch": rival("softmax as a Monarch matrix (2505.18698)", "monarch", APPROXIMATION),
    "windowed softmax": rival("softmax in windows of 8x8 patches (2004.05150)", "windowed", APPROXIMATION),
    "random mixing": rival("frozen random weights (2005.00743)", "random", BOUND),
    "softmax, trained": rival("the teacher's own attention, trained alike", "softmax", BOUND),
}


def timed_as(name: str) -> str | None:
    """Return the row of results/latency.json that is the same computation, or `None` if its speed says nothing."""
    method = METHODS[name]
    if method.kind == BOUND:
        return "softmax" if method.counterpart == "softmax" else None
    wanted = method.options, method.counterpart, method.auto
    return next(other for other, m in METHODS.items() if (m.options, m.counterpart, m.auto) == wanted)
