"""Settings of stage 3."""

from dataclasses import dataclass, field
from typing import ClassVar

from modeling_adala.configuration_adala import pair
from modeling_adala.errors import UsageError

from .base_config import AdaLATrainingArguments
from .data.transforms import parse_size


@dataclass
class SupervisedConfig(AdaLATrainingArguments):
    r"""Settings of `SupervisedTrainer`, on top of `AdaLATrainingArguments`.

    Args:
        learning_rate (`float`, *optional*, defaults to 3e-5): Peak of the schedule for what is pretrained.
        head_learning_rate (`float`, *optional*, defaults to 1e-3): The same for the head.
        new_learning_rate (`float`, *optional*): The same for what a linear student has and its teacher lacks, such as
            local mixing. Default: `learning_rate`.
        max_steps (`int`, *optional*, defaults to 500): Optimizer steps.
        weight_decay (`float`, *optional*, defaults to 0.05): As usual for fine-tuned ViTs.
        head_fit_images (`int`, *optional*, defaults to 2000): Training images at most that a new head, one whose bias
            is all zeros, is first fitted to while the backbone stands still; see `fit_head`. 0 leaves it at random.
        refit_head (`bool`, *optional*, defaults to `False`): Fit a trained head, too, such as that of a fine-tuned
            teacher, which has not seen the features of the student.
        freeze_backbone (`bool`, *optional*, defaults to `False`): Train the head alone, a linear probe.
        teacher_logits_weight (`float`, *optional*): Weight of the teacher's class scores beside the labels, see
            `TeacherTerm`. Default: 1 with a teacher that has a head of these classes.
        teacher_features_weight (`float`, *optional*): Weight of the teacher's final features. Default: 1 with a
            teacher.
        window (`int` or `str`, *optional*): For segmentation: side, or `"224x448"`, of the windows that slide over an
            image at evaluation. Default: whole images.
        stride (`int` or `str`, *optional*): Pixels from one window to the next. Default: half a window.

    Raises:
        UsageError: For a stride that is 0, larger than the window, or without one, and for `refit_head` without
            images.

    Example:

    ```python
    args = SupervisedConfig(output_dir="out/3", num_train_epochs=3, freeze_backbone=True)
    ```
    """

    METRICS: ClassVar[str] = "loss|accuracy|mean_iou|mean_accuracy|pixel_accuracy|iou_.+"

    output_dir: str | None = field(
        default="out/3-supervised", metadata={"help": "Folder for the model and all else that the run leaves."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate of the backbone."})
    head_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the head."})
    new_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of what the teacher lacks. Default: the backbone's."}
    )
    max_steps: int = field(default=500, metadata={"help": "Optimizer steps; -1 to go by num_train_epochs."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay."})
    head_fit_images: int = field(
        default=2000, metadata={"help": "Training images that a new head is first fitted to; 0 leaves it at random."}
    )
    refit_head: bool = field(
        default=False, metadata={"help": "Fit a trained head, too: a teacher's has not seen the student's features."}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head alone."})
    teacher_logits_weight: float | None = field(
        default=None, metadata={"help": "Weight of the teacher's class scores. Default: 1 with a fitting teacher."}
    )
    teacher_features_weight: float | None = field(
        default=None, metadata={"help": "Weight of the teacher's final features. Default: 1 with a teacher."}
    )
    window: int | str | None = field(
        default=None,
        metadata={"help": "Segmentation: side or HEIGHTxWIDTH of evaluation windows. Default: whole images."},
    )
    stride: int | str | None = field(
        default=None, metadata={"help": "Segmentation: pixels from window to window. Default: half a window."}
    )

    def __post_init__(self):
        super().__post_init__()
        _ = self.windows
        if self.refit_head and not self.head_fit_images:
            raise UsageError("refit_head=True needs images; pass head_fit_images above 0, or leave refit_head out.")

    def check_teacher(self, given: bool) -> None:
        """Raise `UsageError` for weights of a teacher that is not there."""
        for name in ("teacher_logits_weight", "teacher_features_weight"):
            weight = getattr(self, name)
            if weight is not None and not given:
                raise UsageError(f"{name}={weight:g} needs a teacher; pass teacher_model (--teacher) too.")

    @property
    def windows(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Size and stride of the windows, both (height, width); `None` for whole images."""
        if self.window is None:
            if self.stride is not None:
                raise UsageError(f"stride={self.stride!r} needs a window; pass window too.")
            return None
        height, width = pair(parse_size("window", self.window))
        if min(height, width) < 1:
            raise UsageError(f"window={self.window!r} must be 1 pixel or more.")
        if self.stride is None:
            return (height, width), (max(1, height // 2), max(1, width // 2))
        down, right = pair(parse_size("stride", self.stride))
        if not (1 <= down <= height and 1 <= right <= width):
            raise UsageError(f"stride={self.stride!r} must be 1 to the window's {height}x{width}, to leave no gap.")
        return (height, width), (down, right)
