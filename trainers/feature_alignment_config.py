"""Settings of stage 2."""

from dataclasses import dataclass, field
from typing import ClassVar

from modeling_adala.errors import UsageError

from .base_config import AdaLATrainingArguments
from .data.feature_cache import DTYPES as CACHE_DTYPES

LOSS_KINDS = ("mse", "cosine")


@dataclass
class FeatureAlignmentConfig(AdaLATrainingArguments):
    r"""Settings of `FeatureAlignmentTrainer`, on top of `AdaLATrainingArguments`.

    Args:
        learning_rate (`float`, *optional*, defaults to 2e-5): Peak of the schedule. The paper gives none; measured
            with DINOv2-small in docs/experiments.md. A model with few channels takes more.
        new_learning_rate (`float`, *optional*, defaults to 5e-4): Peak of the schedule for the parameters that the
            teacher lacks: feature maps, local mixing, and adapters. `None` for `learning_rate`.
        max_steps (`int`, *optional*, defaults to 400): Optimizer steps.
        warmup_steps (`float`, *optional*, defaults to 0.1): Longer than elsewhere: the first steps are rough.
        loss (`str`, *optional*, defaults to `"mse"`): `"mse"` (the paper) or `"cosine"` (cosine and smooth-L1).
        hidden_states (`list[int]`, *optional*): Blocks, from 0, whose outputs are matched too. Default: those after a
            quarter, a half and three quarters of the depth, which learns faster (docs/experiments.md). `[]` matches
            the final features alone, as the paper does.
        hidden_states_weight (`float`, *optional*, defaults to 1): Weight of their mean loss beside the final one.
        cls_weight, register_weight, patch_weight (`float`, *optional*, defaults to 1): Weights of the token groups.
            Each group counts with its mean, so equal weights favor the class token over a single patch.
        calibration_images (`int`, *optional*, defaults to 64): Training images on which the teacher's variance is
            measured, once, before the first step.
        teacher_feature_cache (`str`, *optional*): Folder to keep the teacher's features in, so that the teacher runs
            once over the data and not at every step, in this run and in later ones on the same data. Only without
            random crops and flips (`crop_scale=1`, `horizontal_flip=0`). An image takes 4 bytes times tokens times
            hidden size for the final features and as much for each of `hidden_states`: 1.6 MB for DINOv2-small at 224
            px with the default three. With several processes, the first one builds it while the others wait.
        teacher_feature_cache_dtype (`str`, *optional*, defaults to `"float32"`): `"float16"` takes half the space;
            the targets are then rounded to 11 bits, about as finely as bf16 training computes them.

    Example:

    ```python
    args = FeatureAlignmentConfig(output_dir="out/2", learning_rate=1e-5, max_steps=1000)
    ```
    """

    LOWER_IS_BETTER: ClassVar[bool] = True
    METRICS: ClassVar[str] = r"loss|cls|registers|patches|hidden_\d+"

    output_dir: str | None = field(
        default="out/2-feature-alignment", metadata={"help": "Folder for the model and all else that the run leaves."}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    new_learning_rate: float | None = field(
        default=5e-4, metadata={"help": "Peak learning rate of feature maps, local mixing and adapters."}
    )
    max_steps: int = field(default=400, metadata={"help": "Optimizer steps; -1 to go by num_train_epochs."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: a share of the steps, or a number of them."})
    loss: str = field(default="mse", metadata={"help": f"One of {', '.join(LOSS_KINDS)}.", "choices": LOSS_KINDS})
    hidden_states: list[int] | None = field(
        default=None, metadata={"help": "Blocks matched besides the final features. Default: three, evenly spread."}
    )
    hidden_states_weight: float = field(default=1.0, metadata={"help": "Weight of those, as a mean over them."})
    cls_weight: float = field(default=1.0, metadata={"help": "Weight of the class token's mean error."})
    register_weight: float = field(default=1.0, metadata={"help": "Weight of the registers' mean error."})
    patch_weight: float = field(default=1.0, metadata={"help": "Weight of the patches' mean error."})
    calibration_images: int = field(
        default=64,
        metadata={"help": "Images on which the teacher's variance is measured before the first step."},
    )
    teacher_feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for the teacher's features, computed once. Needs crop_scale 1, horizontal_flip 0."},
    )
    teacher_feature_cache_dtype: str = field(
        default="float32",
        metadata={
            "help": f"How they are stored: one of {', '.join(CACHE_DTYPES)} (half the space).",
            "choices": CACHE_DTYPES,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.cls_weight + self.patch_weight == 0:
            raise UsageError("cls_weight=0 and patch_weight=0 leave nothing to learn; pass more than 0 for one.")

    @property
    def group_weights(self) -> dict[str, float]:
        return {"cls": self.cls_weight, "registers": self.register_weight, "patches": self.patch_weight}
