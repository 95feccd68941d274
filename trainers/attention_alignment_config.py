"""Settings of stage 1."""

from dataclasses import dataclass, field

from modeling_adala.errors import UsageError

from .base_config import AdaLATrainingArguments


@dataclass
class AttentionAlignmentConfig(AdaLATrainingArguments):
    r"""Settings of `AttentionAlignmentTrainer`, on top of `AdaLATrainingArguments`.

    Args:
        learning_rate (`float`, *optional*, defaults to 1e-3): Peak of the schedule. The paper gives none; measured in
            docs/experiments.md.
        max_steps (`int`, *optional*, defaults to 500): Optimizer steps.
        calibration_images (`int`, *optional*, defaults to 64): Training images on which each block's teacher variance
            is measured, once, before the first step.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    max_steps: int = field(default=500, metadata={"help": "Optimizer steps; -1 to go by num_train_epochs."})
    calibration_images: int = field(
        default=64, metadata={"help": "Images on which the teacher's variance is measured before the first step."}
    )

    def __post_init__(self):
        check_calibration_images(self.calibration_images)
        super().__post_init__()


def check_calibration_images(count: int) -> None:
    """Raises `UsageError` unless there is at least one image to measure the teacher on."""
    if count < 1:
        raise UsageError(f"calibration_images={count}: pass 1 or more; the losses are relative to what they measure.")
