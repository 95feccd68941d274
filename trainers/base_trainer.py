"""Base of the three stage trainers: sealed checkpoints, named losses, a stop at what is not finite.

No training loop of our own: every method here overrides one hook of `Trainer`.
"""

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import HubStrategy
from transformers.utils import CONFIG_NAME

from hub_cards import write_card
from modeling_adala.conversion.stored_weights import nonfinite_names
from modeling_adala.errors import AdaLAError, CheckpointError, DataError, UsageError
from modeling_adala.families import is_adala

from .data.image_dataset import collate_images
from .runs.callbacks import TrainingCost
from .runs.checkpoints import find_damage, intact_checkpoint, is_sealed, seal, unseal, writing
from .runs.facts import record_stage
from .upstream import TRAINER_STATE_NAME, TrainOutput

logger = logging.getLogger(__name__)


class _EpochCallback(TrainerCallback):
    """Callback that sets the dataset's epoch, which accelerate omits with several processes and after a resume."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = getattr(train_dataloader, "dataset", None)
        if dataset is not None and hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))


class AdaLATrainer(Trainer):
    """`Trainer` for AdaLA models.

    - Every checkpoint is sealed with the checksums of its files, and resumed from only while they hold.
    - The first loss or gradient that is not a finite number ends the run, and no such weight is ever saved.
    - Loss components reported through `record` are averaged over the logging window and over the processes.
    - Gradient accumulation averages (the stock check multiplies a custom loss by the number of accumulated batches).
    - Waiting for data and peak memory are logged, see `TrainingCost`.
    """

    # with this left to `Trainer`, a forward that takes **kwargs makes it skip the division by the accumulation steps
    loss_is_scaled_for_ga = False
    stage = "supervised"

    def __init__(self, model: nn.Module, args: Any, *, data_collator: Callable | None = None, **kwargs):
        dataset = kwargs.get("train_dataset")
        if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
            raise DataError("train_dataset is empty; check the split and the filters that made it.")
        super().__init__(model=model, args=args, data_collator=data_collator or collate_images, **kwargs)
        # a loss that the model normalizes by num_items_in_batch would be divided by the accumulation steps again
        self.model_accepts_loss_kwargs = False
        self.resumed_from_step = 0
        self._components: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.add_callback(_EpochCallback())
        self._cost = TrainingCost()
        self.add_callback(self._cost)

    def record(self, name: str, value: Tensor) -> None:
        """Keep one value of a loss component for the next log line, without waiting for the device."""
        self._components["train" if self.model.training else "eval"][name].append(value.detach().float())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # an evaluation says how long it took, under the prefix that the caller chose
        prefixes = [key.removesuffix("runtime") for key in logs if key.endswith("_runtime") and key != "train_runtime"]
        mode, prefix = ("eval", prefixes[0]) if prefixes else ("train", "")
        for name, values in self._components[mode].items():
            mean = self.accelerator.gather(torch.stack(values).mean(dim=0, keepdim=True)).mean().item()
            logs[prefix + name] = mean
        self._components[mode].clear()
        if "loss" in logs or "train_runtime" in logs:
            self._cost.add_to(logs, self.args)
        super().log(logs, start_time)

    def evaluation_loop(self, *args, **kwargs):
        self._components["eval"].clear()  # of a `predict`, which logs nothing, or an evaluation that failed
        return super().evaluation_loop(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        with self._cost.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def sample_batches(self, count: int, batch_size: int) -> Iterator[dict[str, Any]]:
        """Yield batches of `count` training images, the same in every process and on resume.

        They are drawn from the whole dataset, as many are sorted by class. Of a stream, they are the first: shuffle
        it, as `DataModule` does.
        """
        dataset: Any = self.train_dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(0)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            examples: Iterator[Any] = islice(iter(dataset), count)
        else:
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.args.seed))
            examples = (dataset[i] for i in order[:count].tolist())
        while batch := list(islice(examples, batch_size)):
            yield self.data_collator(batch)

    def prepare_start(self) -> None:
        """Do what comes before the first step of a run, and not again on resume."""

    def own_learning_rates(self) -> list[tuple[set, float]]:
        """Return sets of parameters that learn at a rate of their own, each with its rate."""
        return []

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            for parameters, learning_rate in self.own_learning_rates():
                _split_groups(optimizer, parameters, learning_rate)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train as `Trainer.train` does; `resume_from_checkpoint=True` starts fresh where there is no checkpoint.

        A checkpoint whose files are not those that were written is not resumed from; see `intact_checkpoint`.

        Raises:
            CheckpointError: If the checkpoint to resume from is damaged, and so are those before it.
            AdaLAError: At the first loss, gradient or weight that is not a finite number.
        """
        if resume_from_checkpoint is True:
            found = intact_checkpoint(self.args.output_dir)
            resume_from_checkpoint = None if found is None else str(found)
        elif resume_from_checkpoint and is_sealed(Path(resume_from_checkpoint)):
            damage = find_damage(resume_from_checkpoint)
            if damage is not None:
                raise CheckpointError(
                    f"resume_from_checkpoint={resume_from_checkpoint!r} is damaged: {damage}; pass an earlier one."
                )
        self.resumed_from_step = 0
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            self.resumed_from_step = state.global_step
            logger.warning("stage %s: resuming from step %d", self.stage, state.global_step)
            if self._has_finished(state):
                return self._take_finished(resume_from_checkpoint, state)
        else:
            self.prepare_start()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _has_finished(self, state: TrainerState) -> bool:
        """Return whether a run in this state has no step left, by the settings of today and not by those back then."""
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return state.epoch is not None and state.epoch >= self.args.num_train_epochs - 1e-6

    def _take_finished(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """Load a checkpoint of the last step; stock `train` (5.24) would resume it and train one step too many."""
        self.state = state
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):  # the stock filter of such losses, which is off, would wait for the device too
            parts = [name for name, values in self._components["train"].items() if not values[-1].isfinite().all()]
            self._stop(f"the loss is {loss.item()}" + (f", in {', '.join(parts)}" if parts else ""))
        return loss

    def _clip_grad_norm(self, model):
        self._check_gradients(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # nothing was clipped
            self._check_gradients(model)
        return super()._get_grad_norm(model, grad_norm)

    def _check_gradients(self, model: nn.Module) -> None:
        if self.accelerator.scaler is not None:
            return  # a gradient scaler skips the steps whose float16 gradients overflow
        # before they are clipped: one that is not finite would then be in all of them
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        if not torch.isfinite(norm):
            bad = (name for name, gradient in gradients.items() if not gradient.isfinite().all())
            self._stop(f"the gradient norm is {norm.item()}, first in {next(bad, 'no parameter by itself')!r}")

    def _stop(self, what: str) -> NoReturn:
        raise AdaLAError(
            f"stage {self.stage}, step {self.state.global_step + 1}: {what}. Nothing of it was saved. Lower"
            f" learning_rate={self.args.learning_rate:g}, or look for images and weights that are not finite."
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        path = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            unseal(path)  # a damaged checkpoint of this step may be there
        self.accelerator.wait_for_everyone()
        with writing(path, cleanup=path):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # other processes write their RNG states
            if self.args.should_save:
                seal(path)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # A stock model would be written under its family's old names, and resuming or loading the best checkpoint
        # would silently leave most tensors as they are (see AdaLAMixin.save_pretrained).
        check_finite(self.model.state_dict() if state_dict is None else state_dict, "the weights")
        if not isinstance(self.model, PreTrainedModel):
            return super()._save(output_dir, state_dict)
        self.model.save_pretrained = partial(self.model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the card of an AdaLA model into `output_dir`, from the facts of this training.

        Args:
            language, license, tags (*optional*): Stated in the card's metadata; tags on top of its own.
            kwargs: As for `Trainer.create_model_card`, which takes them for any other model, stock or with adapters.
                Here the record says what they would.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not is_student(model):
            return super().create_model_card(language=language, license=license, tags=tags, **kwargs)
        if not self.is_world_process_zero():
            return None
        if not os.path.isfile(os.path.join(self.args.output_dir, CONFIG_NAME)):  # nothing was saved there yet
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(self.args.output_dir)
        record_stage(self.args.output_dir, self, model, self.stage)
        tags = [tags] if isinstance(tags, str) else tags
        write_card(self.args.output_dir, self.hub_model_id, language=language, license=license, tags=tags)
        return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # stock pushes no card before the end
        if self.args.hub_strategy == HubStrategy.END:
            return
        if self.is_world_process_zero() and is_student(self.accelerator.unwrap_model(self.model)):
            shutil.copy(os.path.join(checkpoint_folder, CONFIG_NAME), self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)


def base_model(model: nn.Module) -> Any:
    """Return the model inside PEFT's wrapper; its adapters stay active. Any other model is returned as it is."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def _split_groups(optimizer: torch.optim.Optimizer, parameters: set, learning_rate: float) -> None:
    """Give some parameters of an optimizer a learning rate of their own, before its first step."""
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if parameter in parameters]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if parameter not in parameters]
            optimizer.add_param_group(group | {"params": chosen, "lr": learning_rate})


def add_adapters(model: nn.Module, peft_config: Any) -> nn.Module:
    """Return the model in PEFT's wrapper, with adapters.

    Raises:
        UsageError: If it has adapters already, or for prompts, which are for text.
    """
    if getattr(peft_config, "is_prompt_learning", False):
        raise UsageError(f"peft_config={type(peft_config).__name__} learns prompts of text; pass a LoraConfig, say.")
    if base_model(model) is not model:
        raise UsageError("peft_config: the model has adapters already; leave peft_config out, or pass the base model.")
    from peft import get_peft_model  # here, because it takes seconds

    return get_peft_model(cast(Any, model), peft_config)


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise `AdaLAError` if a floating-point tensor holds NaN or infinity, naming the first."""
    bad = nonfinite_names(tensors)
    if bad:
        raise AdaLAError(
            f"{what} are not finite in {len(bad)} of {len(tensors)} tensors, first in {bad[0]!r}, and were not saved;"
            " lower the learning rate and train again."
        )


def is_student(model: nn.Module) -> bool:
    """Return whether this is an AdaLA model without PEFT's wrapper."""
    return isinstance(model, PreTrainedModel) and is_adala(model.config)


def freeze_all_but(model: nn.Module, trainable: Callable[[str], bool]) -> list[str]:
    """Set `requires_grad` by parameter name and return the names that train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
