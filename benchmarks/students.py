"""Students of the benchmarks after each stage, trained once and kept.

What decides a training is the name of the folder that its result is kept in, so that methods that are trained alike
share it, and a killed run goes on where it was.
"""

import hashlib
import inspect
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel

from modeling_adala.inspection.towers import patch_size
from trainers import (
    AttentionAlignmentConfig,
    AttentionAlignmentTrainer,
    FeatureAlignmentConfig,
    FeatureAlignmentTrainer,
)
from trainers.base_config import has_fast_bf16
from trainers.data.data_config import DataModule
from trainers.evaluation.softmax_layers import choose_softmax_layers

from .common import SMOKE
from .counterparts import COUNTERPARTS
from .methods import Method
from .protocols import Protocol

KEPT = SMOKE / "students"
QUIET: dict[str, Any] = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 50}
STAGES = ("converted", "stage 1", "stages 1+2")
ALONE = "stage 2 alone"


@dataclass(frozen=True)
class Trained:
    """Student, the seconds of its stages, and its softmax layers if they were chosen by measurement."""

    student: PreTrainedModel
    seconds: float = 0.0
    chosen: dict[str, Any] = field(default_factory=dict)


class Students:
    """Students of one method and seed under a protocol.

    Args:
        protocol (`Protocol`): With the budgets of all stages.
        method (`Method`): Its own settings come on top.
        seed (`int`): Of the initial weights and of the data.
        teacher (`PreTrainedModel`), data (`DataModule`): Those of the protocol.
        kept (`Path`, *optional*): Folder of the trained students. Default: that of all runs.
    """

    def __init__(
        self,
        protocol: Protocol,
        method: Method,
        seed: int,
        teacher: PreTrainedModel,
        data: DataModule,
        kept: Path | None = None,
    ) -> None:
        self.protocol, self.method, self.seed = protocol, method, seed
        self.teacher, self.data, self.kept = teacher, data, kept or KEPT
        self.budget = {stage: getattr(protocol, stage) | getattr(method, stage) for stage in ("stage_1", "stage_2")}

    @property
    def budget_alone(self) -> dict[str, Any]:
        """Settings of a stage 2 that sees the images of both stages."""
        batches = [stage["per_device_train_batch_size"] for stage in self.budget.values()]
        images = sum(stage["max_steps"] * batch for stage, batch in zip(self.budget.values(), batches, strict=True))
        return self.budget["stage_2"] | {"max_steps": images // batches[1]}

    def after(self, stage: str) -> Trained:
        """Return a student after a stage of `STAGES`, or after stage 2 alone."""
        made: dict[str, Callable[[], Trained]] = {
            STAGES[0]: lambda: Trained(self.converted()),
            STAGES[1]: self.after_stage_1,
            STAGES[2]: self.after_stage_2,
            ALONE: self.after_stage_2_alone,
        }
        return made[stage]()

    def converted(self, softmax_layers: list[int] | None = None) -> PreTrainedModel:
        """Return an untrained student."""
        torch.manual_seed(self.seed)
        sides = zip(self.data.image_size, patch_size(self.teacher.config), strict=True)
        rows, columns = (side // pixels for side, pixels in sides)
        return self.method.student(self.teacher, (rows, columns), self.seed, softmax_layers)

    def after_stage_1(self) -> Trained:
        """Return the student after attention alignment, with the softmax layers that the method asks for."""
        with tempfile.TemporaryDirectory() as folder:
            args = AttentionAlignmentConfig(output_dir=folder, **self.budget["stage_1"], **QUIET, seed=self.seed)

            def trainer_of(student: PreTrainedModel) -> AttentionAlignmentTrainer:
                images = self.data.train_dataset(self.seed)
                return AttentionAlignmentTrainer(student, self.teacher, args, train_dataset=images)

            def train() -> Trained:
                student = self.converted()
                return Trained(student, seconds_of(trainer_of(student).train))

            trained = self._once([], train)
            if not self.method.auto:
                return trained
            start = time.perf_counter()
            student, batches = trained.student, trainer_of(trained.student).calibration_batches()
            layers, ranking, _ = choose_softmax_layers(student, self.teacher, batches, self.method.auto)
        chosen = {"softmax_layers": layers, "ranking": {str(layer): error for layer, error in ranking.items()}}
        return Trained(student, trained.seconds, chosen | {"ranking_seconds": time.perf_counter() - start})

    def after_stage_2(self, start: Trained | None = None) -> Trained:
        """Return the student after both stages. `start` is that of stage 1, trained further in place, if at hand."""

        def train() -> Trained:
            one = start or self.after_stage_1()
            return Trained(one.student, one.seconds + self._align_features(one.student), one.chosen)

        return self._once([self.method.auto, self.budget["stage_2"]], train)

    def after_stage_2_alone(self) -> Trained:
        """Return the converted student after feature alignment with the images of both stages."""

        def train() -> Trained:
            student = self.converted()
            return Trained(student, self._align_features(student, self.budget_alone))

        return self._once([ALONE, self.budget_alone], train)

    def _align_features(self, student: PreTrainedModel, budget: dict[str, Any] | None = None) -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = {**(budget or self.budget["stage_2"]), **QUIET, "seed": self.seed}
            args = FeatureAlignmentConfig(output_dir=folder, **settings)
            images = self.data.train_dataset(self.seed)
            return seconds_of(FeatureAlignmentTrainer(student, self.teacher, args, train_dataset=images).train)

    def _once(self, further: list[Any], train: Callable[[], Trained]) -> Trained:
        """Return what `train` does, or what it did before: `further` is what it depends on beside stage 1."""
        facts = [self.protocol.teacher, self.protocol.data, self.method.options, self.budget["stage_1"], self.seed]
        facts.append(has_fast_bf16())
        if self.method.counterpart is not None:
            rival = COUNTERPARTS[self.method.counterpart]
            facts += [self.method.counterpart, Path(inspect.getfile(rival)).read_text()]
        folder = self.kept / digest([*facts, *further])
        folder.mkdir(parents=True, exist_ok=True)
        record, weights = folder / "trained.json", str(folder / "model.safetensors")
        with FileLock(f"{folder}.lock"):
            if record.exists():
                found = json.loads(record.read_text())
                student = self.converted(found["chosen"].get("softmax_layers"))
                load_model(student, weights)
                return Trained(student, **found)
            trained = train()
            save_model(trained.student, weights)  # a rival has no place in a checkpoint of ours
            record.write_text(json.dumps({"seconds": trained.seconds, "chosen": trained.chosen}))
        return trained


def digest(facts: list[Any]) -> str:
    """Return a name for all that decides a training."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def seconds_of(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
