"""What the three stage configurations share: defaults that differ from `TrainingArguments`, and where they do."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from modeling_adala.cpu_backend import cpu_multiplies_bfloat16
from modeling_adala.errors import UsageError


@dataclass
class AdaLATrainingArguments(TrainingArguments):
    r"""`TrainingArguments` with defaults for vision models.

    > These defaults differ from `TrainingArguments`:
    > - `remove_unused_columns=False`: the stock filter would drop the image column of lazily transformed datasets.
    > - `bf16=None`: on where the hardware multiplies bf16 natively (GPU, or CPU with AVX512-BF16 or AMX), else off.
    > - `lr_scheduler_type="cosine"`, `warmup_steps=0.05`: five percent of the steps, then a cosine to zero.
    > - `per_device_train_batch_size=16`, `per_device_eval_batch_size=64`.
    > - `logging_steps=10`, `logging_first_step=True`.
    > - `save_total_limit=2`: the newest checkpoint to resume from, and one to fall back on should it be damaged.
    > - `ddp_timeout=21600`: the other processes wait while the first one evaluates.
    > - `logging_nan_inf_filter=False`: the stock filter logs a loss of NaN as 0; here such a loss ends the run.
    > - `save_strategy="steps"`, `save_steps=200`.
    """

    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Drop dataset columns that the model does not take."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Images per device and step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per device at evaluation."})
    bf16: bool | None = field(
        default=None, metadata={"help": "bf16 autocast. Default: on where the hardware has fast bf16 products."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule after the warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up: a share of the steps, or a number of them."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    save_steps: float = field(default=200, metadata={"help": "Steps between two checkpoints to resume from."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many of those to keep."})
    ddp_timeout: int = field(default=21600, metadata={"help": "Seconds that processes wait for each other."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log losses that are not finite as 0."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bf16()
        if self.bf16 and not torch.cuda.is_available():
            self.use_cpu = True  # TrainingArguments refuses bf16 on a machine without a GPU otherwise
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)} is negative; pass 0 or more.")
        if self.per_device_train_batch_size < 1:
            raise UsageError(f"per_device_train_batch_size={self.per_device_train_batch_size}: pass 1 or more.")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed} is negative; pass 0 or more.")
        super().__post_init__()


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return cpu_multiplies_bfloat16()
