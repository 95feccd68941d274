"""All stages in order, resumable at any point, with a manifest of facts and a report at the end."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from hub_cards import write_card
from hub_cards.card_data import PICTURES
from hub_cards.records import find_license, read_manifest, write_text
from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.convert import convert, parity_report, student_config
from modeling_adala.conversion.loading import (
    load_classifier,
    load_image_processor,
    load_student,
    load_teacher,
    load_teacher_config,
)
from modeling_adala.errors import AdaLAError, CheckpointError, UsageError

from ..base_config import AdaLATrainingArguments, has_fast_bf16
from ..data.data_config import DataModule
from ..data.digits import find_teacher
from ..data.segmentation_data import SegmentationData
from ..data.sources import fingerprint
from ..evaluation.comparison import Comparison
from ..report.report import write_report
from .callbacks import read_metrics
from .checkpoints import remove_checkpoints
from .facts import data_facts, describe_machine, hash_weights, software_versions, training_settings
from .output_folder import CHECKPOINTS, METRICS, OutputFolder, is_finished, read_manifest_file, remove_folder
from .recipe_config import RecipeConfig
from .stages import STAGES, Stage, StageResult, run_stage

logger = logging.getLogger(__name__)

CONFIG, SPEED, REPORT = "config.yaml", "speed.json", "report.md"
CONTROL, CONTROL_METRICS = "control-feature-alignment", "metrics-control.jsonl"
# what a run leaves besides the folders of its stages
FILES = (CONFIG, SPEED, REPORT, CONTROL_METRICS, *PICTURES)


def run_recipe(config: RecipeConfig, *, from_stage: int | None = None) -> Path:
    """Run the stages of a recipe, or resume where a killed run of it stopped.

    Args:
        config (`RecipeConfig`): What to run.
        from_stage (`int`, *optional*): Throw away what stage 1, 2 or 3 and those after it left, and run them again.

    Returns:
        `Path`: the report, `output_dir/report.md`.

    Raises:
        UsageError: For settings that do not fit, or an `output_dir` that holds a different run.
        DataError, CheckpointError: If a stage fails. What has finished stays, and the same command resumes.
    """
    run = _Run(config, from_stage)
    facts = {"teacher_sha256": hash_weights(run.teacher), "data_fingerprint": fingerprint(run.data.raw_train)}
    with run.folder.claim(run.main, **facts):
        return run.run()


class _RunFolder(OutputFolder):
    """Output folder of a recipe, whose settings may change in what `from_stage` runs again.

    Args:
        config (`RecipeConfig`): What to run.
        from_stage (`int`, *optional*): See `run_recipe`.
    """

    def __init__(self, config: RecipeConfig, from_stage: int | None):
        self.from_stage = from_stage
        settings = {name: value for name, value in config.to_dict().items() if name != "output_dir"}
        stages = [*(stage.directory for stage in STAGES.values()), CONTROL]
        inputs = [find_teacher(config.teacher), config.dataset]
        super().__init__(config.output_dir, "run", settings, inputs, FILES, stages=stages)

    def check_settings(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        numbers = {name.replace("-", "_"): stage.number for name, stage in STAGES.items()}
        late = {"stages": 9, "control": 9, "supervised_teacher": 3, **numbers}
        if self.from_stage is not None and all(late.get(name, 0) >= self.from_stage for name in changed):
            return
        before = found.get("stages", [])
        grown = changed == ["stages"] and wanted["stages"][: len(before)] == before
        if not changed or grown or changed == ["control"]:
            return
        again = ""
        if all(name in numbers for name in changed):
            again = f", or --from-stage {min(numbers[name] for name in changed)} to run what it changes again"
        name = changed[0]
        raise UsageError(
            f"output_dir={str(self.path)!r} holds a run with {name}={found.get(name)!r}, not {wanted[name]!r}; pass"
            f" another output_dir{again}."
        )


class _Run:
    """State of one call of `run_recipe`."""

    def __init__(self, config: RecipeConfig, from_stage: int | None):
        self.config, self.out = config, Path(config.output_dir)
        self.main = PartialState().is_main_process
        self.stages = [STAGES[name] for name in config.stages]
        self.from_stage = from_stage
        self.folder = _RunFolder(config, from_stage)
        if from_stage is not None:
            self._check_from(from_stage)
        teacher = find_teacher(config.teacher)
        teacher_config = load_teacher_config(teacher)
        student_config(teacher_config, config.linear_attention)  # before any weights are read
        self.image_processor = load_image_processor(teacher)
        self.teacher = load_teacher(teacher, config=teacher_config)
        supervised = "supervised" in config.stages
        self.data = DataModule(config, self.teacher.config, self.image_processor, require_labels=supervised)
        device = PartialState().device
        masks = SegmentationData(config, self.teacher.config, self.image_processor) if self.data.has_masks else None
        counts: Any = {"knn_images": config.knn_images, "eval_images": config.eval_images}
        self.comparison = Comparison(self.teacher.to(device), self.data, masks=masks, **counts)
        self.manifest: dict[str, Any] = {}

    def run(self) -> Path:
        """Run what is left to do. The folder has been claimed."""
        if self.main:
            if self.from_stage is not None:
                self._forget_from(self.from_stage)
            write_text(self.out / CONFIG, self.config.to_yaml())
        PartialState().wait_for_everyone()
        self.manifest = self._open_manifest()
        student = self._evaluate_before_training()
        for stage in self.stages:
            directory = self.out / stage.directory
            if is_finished(directory):
                logger.warning("stage %d, %s: already done, in %s", stage.number, stage.name, directory)
                student = self._open_finished(stage)
                if self.main:
                    remove_checkpoints(self._checkpoints(directory))  # a kill may have come between the two
                facts = read_manifest(directory)["stages"][stage.name]
            else:
                result = self._run_stage(stage, student)
                student, facts = result.model, result.facts
            self._record(stages={**self.manifest["stages"], stage.name: facts})
            if self.main and stage.name not in self.manifest["evaluations"]:
                self._evaluate(stage.name, student)
            PartialState().wait_for_everyone()
        if self.config.control:
            self._run_control()
        if self.main:
            write_report(self.out, self.comparison, self.config)
            for stage in self.stages:
                write_card(self.out / stage.directory)  # with figures, speed and pictures
            self.folder.write_record("finished", **self.manifest)
        return self.out / "report.md"

    def _evaluate_before_training(self) -> PreTrainedModel:
        set_seed(self.config.seed)
        student = convert(self.teacher, self.config.linear_attention, check_parity=False)
        vision_config(student.config).teacher_name_or_path = self.config.teacher
        if "parity" not in self.manifest:
            parity = parity_report(self.teacher, student)
            parity.check()
            self._record(parity=parity.differences)
        if self.main and "teacher" not in self.manifest["evaluations"]:
            head = self.comparison.classifier_accuracy(self.teacher)
            self._keep_evaluation("teacher", {} if head is None else {"head_accuracy": head})
        if self.main and "converted" not in self.manifest["evaluations"]:
            self._evaluate("converted", student)
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
            args.check_evaluation(kwargs["eval_dataset"] is not None)
        if stage.name != "supervised" or self.config.supervised_teacher:
            kwargs["teacher_model"] = self.teacher
        return run_stage(
            stage,
            student,
            args,
            folder=self._stage_folder(stage, args),
            metrics_file=self.out / METRICS,
            facts=data_facts(self.data),
            **kwargs,
        )

    def _stage_folder(self, stage: Stage, args: AdaLATrainingArguments) -> OutputFolder:
        directory = Path(args.output_dir)
        return OutputFolder(directory, stage.name, training_settings(args), checkpoints=self._checkpoints(directory))

    def _checkpoints(self, directory: Path) -> Path:
        return self.out / CHECKPOINTS / directory.name

    def _open_finished(self, stage: Stage) -> PreTrainedModel:
        directory = self.out / stage.directory
        try:
            return load_student(str(directory))
        except (AdaLAError, OSError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            again = "" if "--from-stage" in reason else f" Pass --from-stage {stage.number} to run it again."
            raise CheckpointError(
                f"stage {stage.number} has finished, but its model does not open: {reason}.{again}"
            ) from error

    def _run_control(self) -> None:
        """Run stage 2 alone for the wall time of stages 1 and 2, from the same start: what stage 1 is worth."""
        if "control" in self.manifest["evaluations"] or "feature-alignment" not in self.manifest["stages"]:
            return
        first, second = (self.manifest["stages"].get(n, {}) for n in ("attention-alignment", "feature-alignment"))
        if not second.get("seconds") or first.get("resumed_from_step") or second["resumed_from_step"]:
            logger.warning("control: skipped, because the wall time of an interrupted stage is not known")
            return
        stage, directory = STAGES["feature-alignment"], self.out / CONTROL
        if is_finished(directory):  # and was killed before it was evaluated
            student, facts = load_student(str(directory)), read_manifest(directory)["stages"][stage.name]
        else:
            args = self.config.stage_arguments(stage)
            extra = first.get("seconds", 0.0) * second["steps"] / second["seconds"]
            args.max_steps = round(second["steps"] + extra)
            args.output_dir = str(directory)
            set_seed(self.config.seed)
            student = convert(self.teacher, self.config.linear_attention, check_parity=False)
            result = run_stage(
                stage,
                student,
                args,
                folder=self._stage_folder(stage, args),
                image_processor=self.image_processor,
                metrics_file=self.out / CONTROL_METRICS,
                teacher_model=self.teacher,
                train_dataset=self.data.train_dataset(self.config.seed),
                facts=data_facts(self.data),
            )
            student, facts = result.model, result.facts
        self._record(control={name: facts[name] for name in ("seconds", "steps")})
        if self.main:
            self._evaluate("control", student)

    def _evaluate(self, row: str, student: PreTrainedModel) -> None:
        start = time.perf_counter()
        # earlier rows show the way, the last one is the result
        quick = row not in ("control", self.stages[-1].name)
        self._keep_evaluation(row, self.comparison(student, quick=quick))
        logger.info("evaluated %s in %.0f s", row, time.perf_counter() - start)

    def _keep_evaluation(self, row: str, values: dict[str, Any]) -> None:
        # a kill may have come between the two, so that the line is there already
        lines = [line for line in read_metrics(self.out / METRICS) if line.get("evaluation") != row]
        lines.append({"evaluation": row, **values})
        write_text(self.out / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
        self._record(evaluations={**self.manifest["evaluations"], row: values})

    def _last_directory(self, stage: Stage) -> str | None:
        before = [self.out / s.directory for s in self.stages if s.number < stage.number]
        return str(before[-1]) if before else None

    def _check_from(self, number: int) -> None:
        if number not in {stage.number for stage in self.stages}:
            raise UsageError(f"from_stage={number} is none of this run's stages {[s.number for s in self.stages]}.")
        for stage in self.stages:
            directory = self.out / stage.directory
            if stage.number < number and not is_finished(directory):
                raise UsageError(
                    f"from_stage={number} needs {directory}, which has not finished; start at {stage.number}."
                )

    def _forget_from(self, number: int) -> None:
        forgotten = [stage for stage in STAGES.values() if stage.number >= number]
        for stage in forgotten:
            remove_folder(self.out / stage.directory)
            remove_checkpoints(self._checkpoints(self.out / stage.directory))
        names = {stage.name for stage in forgotten}
        if STAGES["feature-alignment"] in forgotten:  # and with it what it is compared with
            names.add("control")
            remove_folder(self.out / CONTROL)
            remove_checkpoints(self._checkpoints(self.out / CONTROL))
        found = read_manifest_file(self.out)
        for key in ("stages", "evaluations"):
            found[key] = {name: known for name, known in found.get(key, {}).items() if name not in names}
        self.folder.write_record("running", **found)
        lines = read_metrics(self.out / METRICS)
        kept = [line for line in lines if line.get("stage") not in names and line.get("evaluation") not in names]
        if lines:
            write_text(self.out / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def _open_manifest(self) -> dict[str, Any]:
        found = read_manifest_file(self.out)
        if "teacher_sha256" in found:
            return {"evaluations": {}, **found}
        manifest = {
            "teacher": self.config.teacher,
            "teacher_revision": getattr(self.teacher.config, "_commit_hash", None),
            "teacher_sha256": self.folder.settings["teacher_sha256"],
            "teacher_license": find_license(
                find_teacher(self.config.teacher), getattr(self.teacher.config, "_commit_hash", None), download=True
            ),
            **data_facts(self.data),
            "data_fingerprint": self.folder.settings["data_fingerprint"],
            "versions": software_versions(),
            "machine": describe_machine(),
            "bf16": has_fast_bf16(),
            "stages": {},
            "evaluations": {},
        }
        self.manifest = manifest
        self._record()
        return manifest

    def _record(self, **facts: Any) -> None:
        self.manifest |= facts
        if self.main:
            self.folder.write_record("running", **self.manifest)
