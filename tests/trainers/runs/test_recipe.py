"""`vit-adala run`: what a run leaves behind, and that neither a second call nor three kills change it."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_helpers import (
    Interrupted,
    assert_same_tensors,
    moved,
    save_teacher,
    unfolded,
)

from modeling_adala.conversion.loading import load_student
from trainers import base_trainer
from trainers.base_trainer import AdaLATrainer
from trainers.runs import checkpoints
from trainers.runs.callbacks import read_metrics
from trainers.runs.checkpoints import is_sealed, list_checkpoints
from trainers.runs.recipe import _Run
from trainers.runs.stages import STAGES
from vit_adala.cli import main

FOLDERS = [stage.directory for stage in STAGES.values()]
STEPS = {"attention-alignment": 8, "feature-alignment": 8, "supervised": 8}
# Six steps an epoch, so that every stage is killed and resumed in reach of another epoch's augmentation.
SHARED = {"save_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "bf16": "false", "use_cpu": "true"}
# Highest loss as the best model: not that of the last step.
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": "true",
    "metric_for_best_model": "loss",
    "greater_is_better": "true",
}


def arguments(teacher: str, out: Path, **changes) -> list[str]:
    settings = {"supervised." + name: value for name, value in BEST.items()}
    for stage, steps in STEPS.items():
        section = stage.replace("-", "_")
        settings |= {f"{section}.{name}": value for name, value in SHARED.items()} | {f"{section}.max_steps": steps}
    settings |= {"feature_alignment.learning_rate": 1e-3, "supervised.learning_rate": 1e-3, **changes}
    flags = {"teacher": teacher, "output-dir": out, "dataset": "mnist-digits", "train-split": "train[:48]"}
    flags |= {"image-size": 28, "knn-images": 48, "eval-images": 30}
    return [
        "run",
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
        *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
    ]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory) -> Path:
    """A run that nothing disturbed. Tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(arguments(teacher, out)) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def weights_of(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {folder: load_file(out / folder / "model.safetensors") for folder in FOLDERS}


def times_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def figures_of(out: Path) -> list[dict]:
    """The lines of `metrics.jsonl` less what things cost."""
    clocks = ("seconds", "runtime", "per_second", "preparation_time", "train_loss", "data_wait", "peak_memory")
    lines = read_metrics(out / "metrics.jsonl")
    return [{n: v for n, v in line.items() if not any(clock in n for clock in clocks)} for line in lines]


def test_run_leaves_settings_facts_figures_report_and_three_checkpoints(finished, teacher):
    names = ["alignment.png", "blocks.png", "config.yaml", "features.png", "manifest.json", "metrics.jsonl"]
    names += ["report.md", "speed.json", "speed.png"]
    assert yaml.safe_load((finished / "config.yaml").read_text())["teacher"] == teacher
    manifest = json.loads((finished / "manifest.json").read_text())
    assert {name: facts["steps"] for name, facts in manifest["stages"].items()} == STEPS
    assert manifest["data_fingerprint"] and len(manifest["teacher_sha256"]) == 64
    report = (finished / "report.md").read_text()
    assert all(f"({picture})" in report for picture in ("alignment.png", "blocks.png", "features.png", "speed.png"))
    for picture in finished.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_stage_folder_opens_as_a_student_that_knows_its_stage(finished):
    images = torch.randn(2, 1, 28, 28)
    for stage in STAGES.values():
        student = load_student(str(finished / stage.directory))
        assert student.config.adala_stage == stage.name
        assert student(images).logits.shape == (2, 10)
        assert (finished / stage.directory / "preprocessor_config.json").is_file()
    weights = list(weights_of(finished).values())
    aligned = {name: weights[0][name] for name in unfolded(weights[0])}
    assert moved(aligned, weights[1]) and moved(weights[1], weights[2])


def test_metrics_hold_every_step_and_every_evaluation_once(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    assert len(lines) == len((finished / "metrics.jsonl").read_text().splitlines())
    for stage, steps in STEPS.items():
        logged = [line["step"] for line in lines if line.get("stage") == stage and "loss" in line]
        assert logged == list(range(1, steps + 1))
    evaluated = [line["evaluation"] for line in lines if "evaluation" in line]
    assert evaluated == ["teacher", "converted", *STAGES]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(losses) == [2, 4, 6, 8]
    assert max(losses, key=losses.get) < 8  # so that loading the best model at the end does something


def test_running_again_writes_the_report_and_nothing_else(teacher, copied):
    before, metrics = {folder: times_of(copied / folder) for folder in FOLDERS}, figures_of(copied)
    manifest = (copied / "manifest.json").read_text()
    (copied / "report.md").unlink()
    # what a kill between writing a stage's folder and removing its checkpoints would leave
    (copied / "checkpoints" / FOLDERS[1] / "checkpoint-8").mkdir(parents=True)
    assert main(arguments(teacher, copied)) == 0
    assert {folder: times_of(copied / folder) for folder in FOLDERS} == before
    assert figures_of(copied) == metrics
    assert (copied / "manifest.json").read_text() == manifest
    assert (copied / "report.md").is_file()
    assert not (copied / "checkpoints").exists()


def test_evaluation_is_logged_once_also_where_a_kill_came_before_its_record(teacher, finished, tmp_path, monkeypatch):
    record = _Run._record

    def killed(self, **facts):
        if "attention-alignment" in facts.get("evaluations", {}):
            raise Interrupted
        record(self, **facts)

    command = arguments(teacher, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_record", killed)
        assert main(command) != 0
    assert main(command) == 0
    assert figures_of(tmp_path / "out") == figures_of(finished)


def test_stage_3_can_learn_from_the_teacher_too(teacher, finished, copied):
    assert main([*arguments(teacher, copied), "--supervised-teacher", "--from-stage", "3"]) == 0
    lines = read_metrics(copied / "metrics.jsonl")
    assert all("teacher_logits" in line for line in lines if line.get("stage") == "supervised" and "loss" in line)
    before, after = weights_of(finished), weights_of(copied)
    assert_same_tensors(after[FOLDERS[1]], before[FOLDERS[1]])
    assert moved(before[FOLDERS[2]], after[FOLDERS[2]])


@pytest.mark.parametrize("row", ["converted", "supervised"])
def test_figures_that_a_kill_prevented_are_taken_by_the_next_run(teacher, copied, row):
    expected = figures_of(copied)
    kept = [line for line in read_metrics(copied / "metrics.jsonl") if line.get("evaluation") != row]
    torn = '{"evaluation": "' + row[:4]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept) + torn)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["stages"].pop(row, None)
    manifest["evaluations"].pop(row)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert main(arguments(teacher, copied)) == 0
    assert sorted(map(str, figures_of(copied))) == sorted(map(str, expected))
    assert list(json.loads((copied / "manifest.json").read_text())["stages"]) == list(STAGES)


def test_lost_log_changes_neither_what_is_done_nor_the_figures_of_the_report(teacher, copied):
    def tables():
        return [line for line in (copied / "report.md").read_text().splitlines() if line.startswith(("| s", "| t"))]

    before, figures = (copied / "manifest.json").read_text(), tables()
    (copied / "metrics.jsonl").write_text("")
    assert main(arguments(teacher, copied)) == 0
    assert (copied / "metrics.jsonl").read_text() == ""
    assert (copied / "manifest.json").read_text() == before
    assert tables() == figures and len(figures) > 3


def test_checksums_of_a_checkpoint_are_verified_once(teacher, tmp_path, monkeypatch):
    out, verified = tmp_path / "out", []
    original = AdaLATrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if (trainer.stage, trainer.state.global_step) == ("feature-alignment", 3):
            raise Interrupted
        return original(trainer, *args, **kwargs)

    with monkeypatch.context() as killed:
        killed.setattr(AdaLATrainer, "training_step", interrupted)
        assert main(arguments(teacher, out)) != 0
    find_damage = checkpoints.find_damage
    for module in (checkpoints, base_trainer):
        monkeypatch.setattr(module, "find_damage", lambda path: verified.append(str(path)) or find_damage(path))
    assert main(arguments(teacher, out)) == 0
    assert len(verified) == 1 and verified[0].endswith("checkpoint-2")


def test_other_settings_in_the_same_folder_are_refused_in_one_line(teacher, finished, capsys):
    before = times_of(finished)
    changed = {"attention_alignment.max_steps": 9}
    assert main(arguments(teacher, finished, **changed)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vit-adala run: output_dir=") and "attention_alignment" in error
    assert main(arguments(teacher, finished, seed=7)) == 2
    assert "seed" in capsys.readouterr().err
    assert times_of(finished) == before


def test_from_stage_2_runs_stages_2_and_3_again(teacher, copied):
    before, first = weights_of(copied), times_of(copied / FOLDERS[0])
    changed = {"feature_alignment.max_steps": 4, "supervised.max_steps": 4}
    assert main([*arguments(teacher, copied, **changed), "--from-stage", "2"]) == 0
    after = weights_of(copied)
    assert times_of(copied / FOLDERS[0]) == first
    assert moved(before[FOLDERS[1]], after[FOLDERS[1]]) and moved(before[FOLDERS[2]], after[FOLDERS[2]])
    manifest = json.loads((copied / "manifest.json").read_text())
    assert [facts["steps"] for facts in manifest["stages"].values()] == [8, 4, 4]
    lines = read_metrics(copied / "metrics.jsonl")
    steps = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    assert steps == [(stage, step) for stage, last in zip(STAGES, (8, 4, 4)) for step in range(1, last + 1)]
    assert [line["evaluation"] for line in lines if "evaluation" in line] == ["teacher", "converted", *STAGES]


def test_control_is_trained_once_also_where_a_kill_came_before_its_evaluation(teacher, copied):
    command, folder = [*arguments(teacher, copied), "--control"], copied / "control-feature-alignment"
    assert main(command) == 0
    manifest = json.loads((copied / "manifest.json").read_text())
    control = manifest.pop("control")
    assert control["steps"] > STEPS["feature-alignment"] and "control" in manifest["evaluations"]
    assert "stage 2 alone" in (copied / "report.md").read_text()
    before = times_of(folder / "model.safetensors")
    del manifest["evaluations"]["control"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert main(command) == 0
    manifest = json.loads((copied / "manifest.json").read_text())
    assert manifest["control"] == control and "control" in manifest["evaluations"]
    assert times_of(folder / "model.safetensors") == before
    changed = arguments(teacher, copied, **{"feature_alignment.max_steps": 4})
    assert main([*changed, "--control", "--from-stage", "2"]) == 0
    assert json.loads((copied / "manifest.json").read_text())["control"]["steps"] < control["steps"]


def test_from_a_stage_whose_predecessor_is_missing_is_refused(teacher, tmp_path, capsys):
    assert main([*arguments(teacher, tmp_path / "out"), "--from-stage", "2"]) == 2
    assert FOLDERS[0] in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.yaml").exists()


# --- kill -9 ---------------------------------------------------------------------------------------------------------

# Stage, step and place of each kill: before a step, and while a checkpoint is being written.
KILLS = [
    ("attention-alignment", 5, "training_step"),
    ("feature-alignment", 4, "_save_optimizer_and_scheduler"),
    ("supervised", 7, "training_step"),
]


def run_and_die(command: list[str], stage: str, step: int, method: str) -> NoReturn:
    original = getattr(AdaLATrainer, method)

    def deadly(trainer, *args, **kwargs):
        if (trainer.stage, trainer.state.global_step) == (stage, step):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(trainer, *args, **kwargs)

    setattr(AdaLATrainer, method, deadly)
    try:
        main(command)
    finally:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_run_killed_in_every_stage_ends_with_the_weights_of_an_undisturbed_one(teacher, finished, tmp_path):
    out = tmp_path / "out"
    left, sealed = [], []
    for kill in KILLS:
        child = os.fork()  # a new interpreter takes longer to start than the run takes
        if child == 0:
            run_and_die(arguments(teacher, out), *kill)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        left.append({path.name: sorted(os.listdir(path)) for path in (out / "checkpoints").iterdir()})
        (folder,) = (out / "checkpoints").iterdir()
        sealed.append([is_sealed(checkpoint) for checkpoint in list_checkpoints(folder)])
    # each time a whole checkpoint to go on from; the second kill came while the next one was being written
    assert left[0] == {FOLDERS[0]: ["checkpoint-2", "checkpoint-4"]}
    assert left[1] == {FOLDERS[1]: ["checkpoint-2", "checkpoint-4"]}
    assert sealed == [[True, True], [True, False], [True, True]]
    assert "checkpoint-6" in left[2][FOLDERS[2]]
    assert main(arguments(teacher, out)) == 0
    actual, expected = weights_of(out), weights_of(finished)
    for folder in FOLDERS:
        assert_same_tensors(actual[folder], expected[folder])
    assert figures_of(out) == figures_of(finished)
    assert len(figures_of(out)) == len((out / "metrics.jsonl").read_text().splitlines())
    resumed = json.loads((out / "manifest.json").read_text())["stages"]
    assert [facts["resumed_from_step"] for facts in resumed.values()] == [4, 2, 6]
    assert not (out / "checkpoints").exists()
