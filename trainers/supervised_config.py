"""Settings of stage 3."""

from dataclasses import dataclass, field

from .base_config import AdaLATrainingArguments


@dataclass
class SupervisedConfig(AdaLATrainingArguments):
    r"""Settings of `SupervisedTrainer`, on top of `AdaLATrainingArguments`.

    Args:
        learning_rate (`float`, *optional*, defaults to 1e-4): Peak of the schedule.
        max_steps (`int`, *optional*, defaults to 500): Optimizer steps.
        weight_decay (`float`, *optional*, defaults to 0.05): As usual for fine-tuned ViTs.
        freeze_backbone (`bool`, *optional*, defaults to `False`): Train the head alone, a linear probe.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    max_steps: int = field(default=500, metadata={"help": "Optimizer steps; -1 to go by num_train_epochs."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head alone."})
