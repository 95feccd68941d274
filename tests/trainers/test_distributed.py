"""Two processes on the CPU give the losses and the weights of one process with the same global batch.

Started by `accelerate launch`, or by torchrun where MPI is not installed: without a host file for mpirun, accelerate
1.15 starts a single process on a CPU, whatever `--num_processes` says.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import assert_same_tensors, moved, save_teacher, unfolded

from modeling_adala.conversion.loading import load_student
from trainers.runs.callbacks import read_metrics
from trainers.runs.stages import STAGES
from vit_adala.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.long]

FOLDERS = {stage.name: stage.directory for stage in STAGES.values()}
# All three commands in one pair of processes: the imports take longer than the training. Each keeps its weights.
DRIVER = """
import json, os, sys
import torch
from accelerate import PartialState
from vit_adala.commands import common
from vit_adala.cli import main

run_stage = common.run_stage


def keep_weights(stage, *args, **kwargs):
    result = run_stage(stage, *args, **kwargs)
    torch.save(result.model.state_dict(), os.path.join(sys.argv[2], f"{stage.name}-{PartialState().process_index}.pt"))
    return result


common.run_stage = keep_weights
for arguments in json.loads(sys.argv[1]):
    if main(arguments):
        sys.exit(f"failed: {arguments}")
"""


def commands(teacher: str, out: Path, source: Path, batch_size: int) -> list[list[str]]:
    """`align`, `distill` and `finetune`, writing to `out`; the last two start from the students in `source`."""
    shared = {
        "dataset": "mnist-digits",
        "train_split": "train[:32]",
        "image_size": 28,
        "max_steps": 4,
        "per_device_train_batch_size": batch_size,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    evaluating = {"eval_split": "test[80:120]", "per_device_eval_batch_size": 5, "eval_strategy": "steps"}
    # the highest loss is the best, so that the best model is not the last
    best = {"eval_steps": 1, "save_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}
    stages = {
        "align": {"output_dir": out / FOLDERS["attention-alignment"]},
        "distill": {
            "teacher": teacher,
            "output_dir": out / FOLDERS["feature-alignment"],
        },
        "finetune": {
            "output_dir": out / FOLDERS["supervised"],
            "load_best_model_at_end": True,
            **evaluating,
            **best,
        },
    }
    models = (teacher, source / FOLDERS["attention-alignment"], source / FOLDERS["feature-alignment"])
    return [
        [
            command,
            str(model),
            *(part for name, value in {**shared, **own}.items() for part in (f"--{name}", str(value))),
        ]
        for model, (command, own) in zip(models, stages.items())
    ]


def torchrun(folder: Path) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]


def accelerate(folder: Path) -> list[str]:
    (folder / "hosts").write_text("localhost slots=2\n")
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--mixed_precision", "no"]
    return [*launch, "--num_machines", "1", "--num_processes", "2", "--mpirun_hostfile", str(folder / "hosts")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of one process and of two."""
    root = tmp_path_factory.mktemp("distributed")
    teacher, single, double = save_teacher(root / "teacher"), root / "single", root / "double"
    for arguments in commands(teacher, single, source=single, batch_size=8):
        assert main(arguments) == 0
    double.mkdir()
    (root / "driver.py").write_text(DRIVER)
    payload = json.dumps(commands(teacher, double, source=single, batch_size=4))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # in a container we are root
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    launch = torchrun if shutil.which("mpirun") is None else accelerate
    command = [*launch(root), str(root / "driver.py"), payload, str(double)]
    launched = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert launched.returncode == 0, launched.stderr
    return single, double


def logged(folder: Path, stage: str, name: str) -> dict[int, float]:
    lines = read_metrics(folder / FOLDERS[stage] / "metrics.jsonl")
    return {line["step"]: line[name] for line in lines if line["stage"] == stage and name in line}


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("attention-alignment", ("loss", "block_0", "block_1", "grad_norm")),
        ("feature-alignment", ("loss", "cls", "patches", "grad_norm")),
        ("supervised", ("loss", "grad_norm", "eval_loss", "eval_accuracy")),
    ],
)
def test_two_processes_log_what_one_logs(runs, stage, names):
    single, double = runs
    for name in names:
        expected = logged(single, stage, name)
        assert list(expected) == [1, 2, 3, 4]
        assert logged(double, stage, name) == pytest.approx(expected, abs=1e-4), name
    assert len(set(logged(single, stage, "loss").values())) == 4  # not constant: the batches and weights do change


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_save_the_weights_of_one(runs, stage):
    single, double = (load_file(folder / FOLDERS[stage] / "model.safetensors") for folder in runs)
    assert_same_tensors(double, single, atol=1e-4)
    student = load_student(str(runs[1] / FOLDERS[stage]))
    assert student.config.adala_stage == stage
    assert_same_tensors(dict(student.state_dict()), double)


@pytest.mark.parametrize("stage", STAGES)
def test_both_processes_end_with_the_weights_that_were_saved(runs, stage):
    """In stage 3 after `load_best_model_at_end`."""
    saved = load_file(runs[1] / FOLDERS[stage] / "model.safetensors")
    for rank in range(2):
        assert_same_tensors(torch.load(runs[1] / f"{stage}-{rank}.pt", weights_only=True), saved)


def test_the_best_model_was_not_the_last(runs):
    losses = logged(runs[0], "supervised", "eval_loss")
    assert max(losses, key=losses.get) < 4


def test_each_stage_moved_the_weights(runs):
    folders = [runs[1] / FOLDERS[stage] / "model.safetensors" for stage in STAGES]
    aligned, distilled, finetuned = (load_file(path) for path in folders)
    aligned = {name: aligned[name] for name in unfolded(aligned)}
    assert moved(aligned, distilled) and moved(distilled, finetuned)


def test_two_processes_leave_no_checkpoints_and_one_line_a_step(runs):
    for folder in runs:
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(FOLDERS.values())
        for stage, count in zip(STAGES, (4 + 1, 4 + 1, 4 + 4 + 1)):
            metrics = folder / FOLDERS[stage] / "metrics.jsonl"
            assert len(metrics.read_text().splitlines()) == len(read_metrics(metrics)) == count
            assert not (folder / FOLDERS[stage] / "checkpoints").exists()
