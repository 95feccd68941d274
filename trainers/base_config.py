"""Base of the three stage configurations: defaults and checks on top of `TrainingArguments`."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import DynamoBackend
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.training_args import ParallelMode

from modeling_adala.errors import UsageError

from .runs.settings import Interval, build, check_settings
from .upstream import cpu_multiplies_bfloat16

COUNT, LEARNING_RATE = Interval(1), Interval(0, 10)
# of every number of `TrainingArguments` and the stages; not in the metadata of fields, all of which HfArgumentParser
# hands to argparse
RANGES = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "num_train_epochs": Interval(0, above=True),
    "max_steps": Interval(1, also=-1),
    "learning_rate": LEARNING_RATE,
    "warmup_steps": Interval(0),
    "weight_decay": Interval(0, 10),
    "adam_beta1": Interval(0, 1, below=True),
    "adam_beta2": Interval(0, 1, below=True),
    "adam_epsilon": Interval(0, 1),
    "gradient_accumulation_steps": COUNT,
    "max_grad_norm": Interval(0),
    "label_smoothing_factor": Interval(0, 1, below=True),
    "neftune_noise_alpha": Interval(0),
    "torch_empty_cache_steps": COUNT,
    "logging_steps": Interval(0, above=True),
    "eval_steps": Interval(0, above=True),
    "eval_delay": Interval(0),
    "eval_accumulation_steps": COUNT,
    "save_steps": Interval(0, above=True),
    "save_total_limit": COUNT,
    "seed": Interval(0, 2**32 - 1),  # what NumPy takes
    "data_seed": Interval(0, 2**32 - 1),
    "dataloader_num_workers": Interval(0, 1024),
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "local_rank": Interval(-1),
    "calibration_images": COUNT,
    "auto_softmax_layers": Interval(0),
    "head_fit_images": Interval(0),
    **dict.fromkeys(("new_learning_rate", "head_learning_rate"), LEARNING_RATE),
    **dict.fromkeys(("cls_weight", "register_weight", "patch_weight", "hidden_states_weight"), Interval(0)),
    **dict.fromkeys(("teacher_logits_weight", "teacher_features_weight"), Interval(0)),
}
_PUSH = "upload the finished folder with vit-adala push DIR REPO_ID"
_COMMAND = "the command decides that; leave it out"


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
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Learning-rate schedule after the warm-up."}
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up: a share of the steps, or a number of them."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    save_steps: float = field(default=200, metadata={"help": "Steps between two checkpoints to resume from."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many of those to keep."})
    ddp_timeout: int = field(default=21600, metadata={"help": "Seconds that processes wait for each other."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log losses that are not finite as 0."})

    # what the evaluation during training reports, as a pattern for `metric_for_best_model`
    METRICS: ClassVar[str] = "loss"
    LOWER_IS_BETTER: ClassVar[bool] = False  # all of these; else what is named loss
    # for scripts, and what a command or a recipe says instead of taking them
    NOT_OFFERED: ClassVar[dict[str, str]] = {
        "resume_from_checkpoint": "the same command resumes by itself; leave it out",
        "hub_token": "log in with hf auth login, or set HF_TOKEN",
        **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"), _PUSH),
        **dict.fromkeys(("hub_always_push", "hub_revision"), _PUSH),
        **dict.fromkeys(("do_train", "do_eval", "do_predict"), _COMMAND),
        "parallelism_config": "it takes an object of accelerate, which only a script can pass",
    }

    def __post_init__(self):
        check_settings(self, RANGES)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bf16(self.use_cpu)  # type: ignore[has-type]
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # TrainingArguments refuses bf16 on a machine without a GPU otherwise
        if self.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
            raise UsageError(f"deepspeed={self.deepspeed!r} needs the package deepspeed; install it, or leave it out.")
        backends = [member.value.lower() for member in DynamoBackend]
        if self.torch_compile_backend is not None and self.torch_compile_backend.lower() not in backends:
            raise UsageError(
                f"torch_compile_backend={self.torch_compile_backend!r} is unknown; choose from {', '.join(backends)}."
            )
        metric = self.metric_for_best_model
        if self.LOWER_IS_BETTER and self.greater_is_better is None and metric:  # type: ignore[has-type]
            self.greater_is_better = metric.endswith(("cosine", "accuracy"))  # of an evaluator; else errors
        super().__post_init__()
        if self.fsdp and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise UsageError("fsdp shards over several processes; start them with accelerate launch, or leave it out.")
        available = get_available_reporting_integrations()
        for name in self.report_to:
            try:
                get_reporting_integration_callbacks([name])
            except ValueError as error:
                raise UsageError(f"report_to={name!r}: {error}") from error
            if name not in available:
                raise UsageError(
                    f"report_to={name!r}: the package is not installed; choose from {', '.join(['none', *available])},"
                    f" or install it."
                )

    def check_evaluation(self, possible: bool) -> None:
        """Raise `UsageError` if evaluation during training is asked for, but there are no images for it."""
        if self.eval_strategy != "no" and not possible:
            raise UsageError(
                f"eval_strategy={self.eval_strategy.value!r}: the dataset has no test or validation split; pass"
                " --eval-split, or leave it out."
            )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], where: str = "") -> Self:
        """Make the config of a command line or a recipe; see `settings.build`.

        Raises:
            UsageError: For what only a script can use, too, and for a metric that the stage does not report.
        """
        for name in settings:
            if name in cls.NOT_OFFERED:
                raise UsageError(f"{where}{name} is not for commands and recipes: {cls.NOT_OFFERED[name]}.")
        args = build(cls, settings, where)
        metric = args.metric_for_best_model
        if metric is not None and re.fullmatch(cls.METRICS, metric.removeprefix("eval_")) is None:
            choices = cls.METRICS.replace("|", ", ").replace(r"\d+", "N").replace(".+", "LABEL")
            raise UsageError(f"{where}metric_for_best_model={metric!r} is not reported; choose from {choices}.")
        return args


def has_fast_bf16(use_cpu: bool = False) -> bool:
    """Return whether this machine multiplies bf16 matrices in hardware, as far as is known.

    Args:
        use_cpu (`bool`, *optional*, defaults to `False`): Ask the CPU even where there is an accelerator.
    """
    if use_cpu or not torch.accelerator.is_available():
        return cpu_multiplies_bfloat16()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def evaluation_dtype() -> torch.dtype | None:
    """Return the dtype of autocast in evaluation, which is that of training: bf16 if fast, else `None` for none."""
    return torch.bfloat16 if has_fast_bf16() else None


def evaluation_autocast(device_type: str) -> torch.autocast:
    """Return the context of `evaluation_dtype`, to be entered on a device of this type."""
    dtype = evaluation_dtype()
    return torch.autocast(device_type, dtype, enabled=dtype is not None)
