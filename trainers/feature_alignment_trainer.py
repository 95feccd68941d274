"""Stage 2: the whole student learns to match the teacher's final features, on its own forward pass."""

import copy
from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.loading import load_student
from modeling_adala.errors import UsageError
from modeling_adala.inspection.towers import (
    block_outputs,
    forward_features,
    hold_positions,
    token_groups,
    vision_tower,
)

from .alignment_trainer import AlignmentTrainer
from .base_trainer import add_adapters, freeze_all_but
from .data.feature_cache import (
    FEATURES,
    CollateWithFeatures,
    WithTeacherFeatures,
    build_cache,
    cache_key,
    check_folder,
    open_cache,
)
from .data.image_dataset import ImageDataset, collate_images
from .feature_alignment_config import FeatureAlignmentConfig
from .losses import TeacherVariance, feature_alignment_loss
from .runs.facts import hash_weights

# they have no part in the final features; left trainable, DDP would wait for gradients that never come
UNUSED = ("pooler.", "head.", "embeddings.mask_token")


class FeatureAlignmentTrainer(AlignmentTrainer):
    """Trainer of the whole student against the frozen teacher's features after the last layer norm.

    Errors of stage 1 pile up over the layers; this stage sees them, because the student runs free on the image
    (ViT-AdaLA, arXiv 2603.16063, stage 2). A head on the student, if it has one, is left alone.

    Without random crops, the teacher need not run at every step: see `FeatureAlignmentConfig.teacher_feature_cache`.

    Logged: `loss`, and `cls`, `registers`, `patches` (relative errors of the final features), `hidden_<i>` if asked.

    Args:
        model, teacher_model, args, peft_config, evaluator, kwargs: See `AlignmentTrainer`.

    Example:

    ```python
    trainer = FeatureAlignmentTrainer(
        model=student,
        teacher_model=teacher,
        args=FeatureAlignmentConfig(output_dir="out/2", max_steps=1),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    stage = "feature-alignment"

    def __init__(
        self,
        model: str | PathLike | PreTrainedModel,
        teacher_model: str | PreTrainedModel,
        args: FeatureAlignmentConfig | None = None,
        *,
        peft_config: Any | None = None,
        **kwargs: Any,
    ):
        model = load_student(fspath(model)) if isinstance(model, str | PathLike) else model
        args = FeatureAlignmentConfig() if args is None else copy.copy(args)  # hidden_states is filled in
        layers = vision_config(model.config).num_hidden_layers
        if args.hidden_states is None:
            args.hidden_states = sorted({max(layers * quarter // 4 - 1, 0) for quarter in (1, 2, 3)})
        wrong = [layer for layer in args.hidden_states if not -layers <= layer < layers]
        if wrong:
            raise UsageError(
                f"hidden_states={args.hidden_states}: this model has layers 0 to {layers - 1}, not {wrong}."
            )
        wrapped = model
        if peft_config is not None:
            wrapped = add_adapters(model, peft_config)
        else:
            trained = {id(p) for n, p in vision_tower(model).named_parameters() if not n.startswith(UNUSED)}
            names = {name for name, parameter in model.named_parameters() if id(parameter) in trained}
            freeze_all_but(model, names.__contains__)
        if args.teacher_feature_cache is not None:
            check_folder(args.teacher_feature_cache)
            cache_key(kwargs.get("train_dataset"))  # refuses data that cannot be cached
            kwargs["train_dataset"] = WithTeacherFeatures(kwargs["train_dataset"])
            kwargs["data_collator"] = CollateWithFeatures(kwargs.get("data_collator") or collate_images)
        # the pair is checked on the bare student; the trainer then holds what trains
        super().__init__(model=wrapped, teacher_model=teacher_model, args=args, **kwargs)
        self.groups = token_groups(model.config)
        self.layers = sorted(layer % layers for layer in args.hidden_states)
        self._variances: list[dict[str, Tensor]] | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixel_values = inputs["pixel_values"]
        targets = self.targets(pixel_values, inputs.get(FEATURES))
        features = self.run_as_forward(model, self.features, pixel_values)
        losses = [
            feature_alignment_loss(ours, theirs, self.groups, variances, self.args.group_weights, self.args.loss)
            for ours, theirs, variances in zip(features, targets, self.variances(), strict=True)
        ]
        loss = losses[0]["loss"]
        for name in self.groups:
            self.record(name, losses[0][name])
        if self.layers:
            extra = torch.stack([component["loss"] for component in losses[1:]])
            loss = loss + self.args.hidden_states_weight * extra.mean()
            for layer, value in zip(self.layers, extra, strict=True):
                self.record(f"hidden_{layer}", value)
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def targets(self, pixel_values: Tensor, cached: Tensor | None = None) -> list[Tensor]:
        """Return the teacher's `features`, from `cached` `(batch, states, tokens, hidden_size)` if given."""
        if cached is not None:
            return [state.float() for state in cached.unbind(dim=1)]
        return self.features(self.teacher_model, pixel_values)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if isinstance(self.train_dataset, WithTeacherFeatures):
            self.train_dataset.folder = self._cached_features(self.train_dataset.dataset)
        return super().train(resume_from_checkpoint, **kwargs)

    def _cached_features(self, dataset: ImageDataset) -> Path:
        """Return the folder of the teacher's features of all training images, which are computed if missing."""
        path, dtype = self.args.teacher_feature_cache, self.args.teacher_feature_cache_dtype
        key = cache_key(
            dataset,
            teacher=hash_weights(self.teacher_model),
            autocast=self.accelerator.mixed_precision,
            hidden_states=self.layers,
            dtype=dtype,
        )
        if self.is_world_process_zero() and open_cache(path, key) is None:
            build_cache(path, key, self._all_targets(dataset), dtype)
        self.accelerator.wait_for_everyone()
        folder = open_cache(path, key)
        if folder is None:
            raise UsageError(f"teacher_feature_cache={path!r} must be a folder that all processes can read.")
        return folder

    def _all_targets(self, dataset: ImageDataset) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        for batch in tqdm(loader, desc="teacher features", disable=self.args.disable_tqdm):
            with self.compute_loss_context_manager():
                targets = self.targets(batch["pixel_values"].to(self.args.device))
            yield batch["pixel_values"], torch.stack([target.float() for target in targets], dim=1)

    def features(self, model: PreTrainedModel, pixel_values: Tensor) -> list[Tensor]:
        """Return the final features, then the outputs of the chosen blocks, each `(batch, tokens, hidden_size)`."""
        hold_positions(model)
        with block_outputs(model, self.layers) as states:
            features = forward_features(model, pixel_values)
        return [features, *(states[layer] for layer in self.layers)]

    @torch.no_grad()
    def variances(self) -> list[dict[str, Tensor]]:
        """Return the teacher's variance per matched tensor and token group, over the calibration images."""
        if self._variances is None:
            measured = [{name: TeacherVariance() for name in self.groups} for _ in (None, *self.layers)]
            with self.compute_loss_context_manager():
                for pixel_values in self.calibration_batches():
                    for tensor, of_groups in zip(self.features(self.teacher_model, pixel_values), measured):
                        for name, group in self.groups.items():
                            of_groups[name].add(tensor[:, group])
            self._variances = [
                {name: variance.value() for name, variance in of_groups.items()} for of_groups in measured
            ]
        return self._variances
