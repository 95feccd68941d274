"""Settings of stage 1."""

from dataclasses import dataclass, field
from typing import ClassVar

from .base_config import AdaLATrainingArguments


@dataclass
class AttentionAlignmentConfig(AdaLATrainingArguments):
    r"""Settings of `AttentionAlignmentTrainer`, on top of `AdaLATrainingArguments`.

    Args:
        learning_rate (`float`, *optional*, defaults to 1e-3): Peak of the schedule. The paper gives none; measured in
            docs/experiments.md.
        new_learning_rate (`float`, *optional*): Peak of the schedule for the parameters that the teacher lacks, those
            of feature maps and local mixing. Default: `learning_rate`.
        max_steps (`int`, *optional*, defaults to 500): Optimizer steps.
        auto_softmax_layers (`int`, *optional*, defaults to 0): Linear layers that go back to softmax after the last
            step: those whose return brings the student's final features closest to the teacher's, measured on the
            calibration images (`rank_softmax_layers`). The command line writes `--softmax-layers auto:K`.
        calibration_images (`int`, *optional*, defaults to 64): Training images on which each block's teacher variance
            is measured, once, before the first step.

    Example:

    ```python
    args = AttentionAlignmentConfig(output_dir="out/1", max_steps=1000, auto_softmax_layers=1)
    ```
    """

    LOWER_IS_BETTER: ClassVar[bool] = True
    METRICS: ClassVar[str] = r"loss|block_\d+"

    output_dir: str | None = field(
        default="out/1-attention-alignment",
        metadata={"help": "Folder for the model and all else that the run leaves."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    new_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of feature maps and local mixing. Default: learning_rate."},
    )
    max_steps: int = field(default=500, metadata={"help": "Optimizer steps; -1 to go by num_train_epochs."})
    auto_softmax_layers: int = field(
        default=0,
        metadata={"help": "Layers that go back to softmax after the last step, chosen by measurement."},
    )
    calibration_images: int = field(
        default=64,
        metadata={"help": "Images on which the teacher's variance is measured before the first step."},
    )
