"""All stages in order, resumable at any point, with a manifest of facts and a report at the end."""

import copy
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import AutoImageProcessor, PreTrainedModel, set_seed

from hub_cards import write_card
from hub_cards.records import find_license, read_manifest
from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion import convert, load_teacher, load_teacher_config, student_config
from modeling_adala.errors import UsageError

from .base_config import has_fast_bf16
from .callbacks import append_metrics, read_metrics
from .checkpoints import whole_file
from .comparison import Comparison
from .data_config import DataModule
from .digits import find_teacher
from .facts import data_facts, describe_machine, hash_weights, software_versions
from .recipe_config import RecipeConfig
from .report import write_report
from .sources import fingerprint
from .stages import STAGES, Stage, StageResult, load_classifier, load_student, remove_checkpoints, run_stage

logger = logging.getLogger(__name__)


def run_recipe(config: RecipeConfig, *, from_stage: int | None = None) -> Path:
    """Runs the stages of a recipe, or goes on where a killed run of it stopped.

    Args:
        config (`RecipeConfig`): What to run.
        from_stage (`int`, *optional*): Throw away what stage 1, 2 or 3 and those after it left, and run them again.

    Returns:
        `Path`: the report, `output_dir/report.md`.

    Raises:
        UsageError: for settings that do not fit, or an `output_dir` that holds a different run.
        DataError, CheckpointError: see there. What finished before stays, and the same command goes on.
    """
    return _Run(config, from_stage).run()


class _Run:
    """The state of one call of `run_recipe`."""

    def __init__(self, config: RecipeConfig, from_stage: int | None):
        self.config, self.out = config, Path(config.output_dir)
        self.main = PartialState().is_main_process
        self.stages = [STAGES[name] for name in config.stages]
        teacher = find_teacher(config.teacher)
        student_config(load_teacher_config(teacher), **config.feature_options)  # before any time is spent
        self._check_output_dir(from_stage)
        self.image_processor = load_image_processor(teacher)
        self.teacher = load_teacher(teacher)
        supervised = "supervised" in config.stages
        self.data = DataModule(config, self.teacher.config, self.image_processor, require_labels=supervised)
        device = PartialState().device
        self.comparison = Comparison(
            self.teacher.to(device), self.data, knn_images=config.knn_images, eval_images=config.eval_images
        )
        # now that all is there: a mistake in the data should not stand in the way of its repair
        self._claim_output_dir(from_stage)
        self.manifest = self._open_manifest()

    def run(self) -> Path:
        student = self._evaluate_before_training()
        for stage in self.stages:
            directory = self.out / stage.directory
            if directory.is_dir():
                logger.warning("stage %d, %s: finished before, in %s", stage.number, stage.name, directory)
                student = load_student(str(directory))
                if self.main:
                    remove_checkpoints(directory)  # a kill may have come between the two
                self._finish(stage, student)
                continue
            student = self._run_stage(stage, student).model
        if self.config.control:
            self._run_control()
        if self.main:
            write_report(self.out, self.comparison, self.config)
            for stage in self.stages:
                write_card(self.out / stage.directory)  # with speed and pictures
        return self.out / "report.md"

    def _evaluate_before_training(self) -> PreTrainedModel:
        set_seed(self.config.seed)
        student, parity = convert(copy.deepcopy(self.teacher).cpu(), **self.config.feature_options)
        vision_config(student.config).teacher_name_or_path = self.config.teacher
        if parity is not None and "parity" not in self.manifest:
            self._record(parity=parity.differences)
        if self.main and "teacher" not in self._evaluated():
            head = self.comparison.classifier_accuracy(self.teacher)
            self._evaluate("teacher", None, {} if head is None else {"head_accuracy": head})
        if self.main and "swapped" not in self._evaluated():
            self._evaluate("swapped", student)
        return student

    def _run_stage(self, stage: Stage, student: PreTrainedModel) -> StageResult:
        args = self.config.stage_arguments(stage)
        dataset = self.data.train_dataset(self.config.seed)
        kwargs: dict[str, Any] = {"train_dataset": dataset, "image_processor": self.image_processor}
        if stage.name == "supervised":
            set_seed(self.config.seed)
            source = self._last_directory(stage)
            if source is not None:
                student = load_classifier(source, self.data.labels or [])
            kwargs["eval_dataset"] = self.data.eval_dataset(self.config.eval_images)
        else:
            kwargs["teacher_model"] = self.teacher
        metrics = self.out / "metrics.jsonl"
        result = run_stage(stage, student, args, metrics_file=metrics, facts=data_facts(self.data), **kwargs)
        self._finish(stage, result.model)
        return result

    def _finish(self, stage: Stage, student: PreTrainedModel) -> None:
        """Records a stage, also one whose process was killed between its checkpoint and this line."""
        facts = read_manifest(self.out / stage.directory)["stages"][stage.name]
        self._record(stages={**self.manifest["stages"], stage.name: facts})
        if self.main and stage.name not in self._evaluated():
            self._evaluate(stage.name, student)
        if self.main:
            write_card(self.out / stage.directory)  # with its figures, which a stage alone does not have
        PartialState().wait_for_everyone()

    def _run_control(self) -> None:
        """Stage 2 alone for the wall time of stages 1 and 2, from the same start: what stage 1 is worth."""
        if "control" in self._evaluated() or "feature-alignment" not in self.manifest["stages"]:
            return
        first, second = (self.manifest["stages"].get(n, {}) for n in ("attention-alignment", "feature-alignment"))
        if not second.get("seconds") or first.get("resumed_from_step") or second["resumed_from_step"]:
            logger.warning("control: skipped, because the wall time of an interrupted stage is not known")
            return
        stage = STAGES["feature-alignment"]
        args = self.config.stage_arguments(stage)
        extra = first.get("seconds", 0.0) * second["steps"] / second["seconds"]
        args.max_steps = round(second["steps"] + extra)
        args.output_dir = str(self.out / "control-feature-alignment")
        set_seed(self.config.seed)
        student, _ = convert(copy.deepcopy(self.teacher).cpu(), check_parity=False, **self.config.feature_options)
        result = run_stage(
            stage,
            student,
            args,
            image_processor=self.image_processor,
            metrics_file=self.out / "metrics-control.jsonl",
            teacher_model=self.teacher,
            train_dataset=self.data.train_dataset(self.config.seed),
            facts=data_facts(self.data),
        )
        self._record(control={"seconds": round(result.seconds, 1), "steps": result.steps})
        if self.main:
            self._evaluate("control", result.model)

    def _evaluate(self, row: str, student: PreTrainedModel | None, values: dict[str, Any] | None = None) -> None:
        start = time.perf_counter()
        # earlier rows show the way, the last one is the result
        quick = row not in ("control", self.stages[-1].name)
        values = self.comparison(student, quick=quick) if student is not None else values or {}
        append_metrics(self.out / "metrics.jsonl", {"evaluation": row, **values})
        logger.info("evaluated %s in %.0f s", row, time.perf_counter() - start)

    def _evaluated(self) -> set[str]:
        return {line["evaluation"] for line in read_metrics(self.out / "metrics.jsonl") if "evaluation" in line}

    def _last_directory(self, stage: Stage) -> str | None:
        before = [self.out / s.directory for s in self.stages if s.number < stage.number]
        return str(before[-1]) if before else None

    def _check_output_dir(self, from_stage: int | None) -> None:
        """Refuses an `output_dir` that another run left, and a `from_stage` that cannot be."""
        settings = yaml.safe_load(self.config.to_yaml())
        file = self.out / "config.yaml"
        if self.main and file.is_file():
            found = yaml.safe_load(file.read_text())
            changed = [name for name in settings if found.get(name) != settings[name] and name != "output_dir"]
            numbers = {name.replace("-", "_"): stage.number for name, stage in STAGES.items()}
            late = {"stages": 9, "control": 9, **numbers}
            still_valid = from_stage is not None and all(late.get(name, 0) >= from_stage for name in changed)
            grown = changed == ["stages"] and settings["stages"][: len(found["stages"])] == found["stages"]
            if changed and not still_valid and not grown and changed != ["control"]:
                name = changed[0]
                again = ""
                if all(name in numbers for name in changed):
                    again = f", or --from-stage {min(numbers[name] for name in changed)} to run what it changes again"
                raise UsageError(
                    f"output_dir={str(self.out)!r} holds a run with {name}={found.get(name)!r}, not {settings[name]!r}"
                    f"; pass another output_dir{again}."
                )
        if self.main and from_stage is not None:
            self._check_from(from_stage)

    def _claim_output_dir(self, from_stage: int | None) -> None:
        if self.main:
            if from_stage is not None:
                self._forget_from(from_stage)
            self.out.mkdir(parents=True, exist_ok=True)
            whole_file(self.out / "config.yaml", self.config.to_yaml())
        PartialState().wait_for_everyone()

    def _check_from(self, number: int) -> None:
        if number not in {stage.number for stage in self.stages}:
            raise UsageError(f"from_stage={number} is none of this run's stages {[s.number for s in self.stages]}.")
        for stage in self.stages:
            directory = self.out / stage.directory
            if stage.number < number and not directory.is_dir():
                raise UsageError(
                    f"from_stage={number} needs {directory}, which is not there; start at {stage.number}."
                )

    def _forget_from(self, number: int) -> None:
        forgotten = [stage for stage in STAGES.values() if stage.number >= number]
        for stage in forgotten:
            shutil.rmtree(self.out / stage.directory, ignore_errors=True)
            remove_checkpoints(self.out / stage.directory)
        names = {stage.name for stage in forgotten}
        lines = read_metrics(self.out / "metrics.jsonl")
        kept = [line for line in lines if line.get("stage") not in names and line.get("evaluation") not in names]
        if lines:
            whole_file(self.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def _open_manifest(self) -> dict[str, Any]:
        path = self.out / "manifest.json"
        if path.is_file():
            return json.loads(path.read_text())
        manifest = {
            "teacher": self.config.teacher,
            "teacher_revision": getattr(self.teacher.config, "_commit_hash", None),
            "teacher_sha256": hash_weights(self.teacher),
            "teacher_license": find_license(
                find_teacher(self.config.teacher), getattr(self.teacher.config, "_commit_hash", None), download=True
            ),
            **data_facts(self.data),
            "data_fingerprint": fingerprint(self.data.raw_train),
            "versions": software_versions(),
            "machine": describe_machine(),
            "bf16": has_fast_bf16(),
            "stages": {},
        }
        self.manifest = manifest
        self._record()
        return manifest

    def _record(self, **facts: Any) -> None:
        self.manifest |= facts
        if self.main:
            whole_file(self.out / "manifest.json", json.dumps(self.manifest, indent=2) + "\n")


def load_image_processor(name_or_path: str) -> Any | None:
    """The checkpoint's image processor, or `None`, with a warning, where it has none."""
    try:
        return AutoImageProcessor.from_pretrained(name_or_path, backend="pil")
    except (OSError, ValueError) as error:
        logger.warning(
            "%s has no image processor (%s): pixels are fed as 0..1", name_or_path, str(error).split("\n")[0]
        )
        return None
