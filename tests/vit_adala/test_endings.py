"""How a command ends that does not succeed: one line and the right exit code, whatever was raised."""

import errno
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from training_helpers import save_teacher

from modeling_adala import UsageError
from modeling_adala.errors import CheckpointError
from trainers.runs.checkpoints import CHECKSUMS
from vit_adala.cli import main
from vit_adala.commands import inspect
from vit_adala.interruption import Terminated, writes_to

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

ENDINGS = {
    "own mistake": (UsageError("size=3: pass 4."), 2, "size=3: pass 4."),
    "own failure": (CheckpointError("x is\nbroken; repair it."), 1, "x is broken; repair it."),
    "several lines": (RuntimeError("first\nsecond"), 1, "unexpected RuntimeError: first; --debug .* report"),
    "no text": (AssertionError(), 1, "unexpected AssertionError: AssertionError; --debug"),
    "key": (KeyError("evil"), 1, "unexpected KeyError: 'evil'; --debug"),
    "recursion": (RecursionError("maximum depth"), 1, "unexpected RecursionError: maximum depth; --debug"),
    "control characters": (ValueError("a\x1b[31mb"), 1, r"unexpected ValueError: a \[31mb; --debug"),
    "file": (
        PermissionError(errno.EACCES, "Permission denied", "/x/y"),
        1,
        "Permission denied: '/x/y'; check the path",
    ),
    "no file named": (OSError(errno.EINVAL, "Invalid argument"), 1, "unexpected OSError: .* --debug"),
    "package": (ImportError("Using X requires x: `pip install x`"), 1, "Using X requires x.*: run vit-adala doctor"),
    "memory": (MemoryError(), 1, "out of memory .*; lower --image-size or the batch size"),
    "memory of a GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        1,
        "out of memory .*; lower --image-size",
    ),
    "interrupted": (KeyboardInterrupt(), 130, r"interrupted\."),
    "terminated": (Terminated(), 143, r"terminated\."),
}


def fail_with(error: BaseException, monkeypatch) -> None:
    def fail(arguments):
        raise error

    monkeypatch.setattr(inspect, "main", fail)


@pytest.mark.parametrize(("error", "code", "line"), ENDINGS.values(), ids=list(ENDINGS))
def test_every_exception_ends_in_one_line(monkeypatch, capsys, error, code, line):
    fail_with(error, monkeypatch)
    writes_to("nowhere")
    assert main(["inspect"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (said,) = captured.err.splitlines()
    assert re.match(f"vit-adala inspect: {line}", said), said
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            main(["inspect", "--debug"])


def test_interruption_promises_to_resume_only_where_there_is_something_to_resume_from(monkeypatch, capsys, tmp_path):
    fail_with(KeyboardInterrupt(), monkeypatch)
    writes_to(tmp_path)
    for file, resumes in (("checkpoints/checkpoint-2/model.safetensors", False), ("metrics.jsonl", False),
                          ("checkpoints/checkpoint-2/trainer_state.json", False),
                          (f"checkpoints/checkpoint-2/{CHECKSUMS}", True)):  # fmt: skip
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        assert main(["inspect"]) == 130
        assert ("the same command resumes" in capsys.readouterr().err) == resumes


def test_output_that_cannot_be_written_is_named(monkeypatch, capsys, tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["inspect", teacher, "--json"]) == 1
    assert "the output could not be written: No space left on device" in capsys.readouterr().err
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main(["inspect", teacher, "--json"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""  # as with `| head -1`


def test_cache_that_cannot_be_written_is_not_blamed_on_the_data(monkeypatch, capsys, tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nobody/.cache"))
    for command in (["align", teacher], ["run", "--teacher", teacher], ["evaluate", teacher, "--teacher", teacher]):
        assert main([*command, "--dataset", "mnist-digits"]) == 2
        assert "'/proc/nobody/.cache', cannot be written" in (said := capsys.readouterr().err) and "HF_HOME" in said


def test_interrupt_during_the_imports_of_a_program_in_a_terminal():
    terminal, inside = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", "vit_adala", "align", "x"], stdout=inside, stderr=inside, env=ENVIRONMENT
    )
    os.close(inside)
    said = b""
    while b"loading ..." not in said and select.select([terminal], [], [], 60)[0]:
        said += os.read(terminal, 1000)
    time.sleep(1)
    program.send_signal(signal.SIGINT)
    assert program.wait(60) == 130
    said += os.read(terminal, 1000)
    os.close(terminal)
    assert said.decode().splitlines() == ["vit-adala align: loading ...", "vit-adala align: interrupted."]


@pytest.mark.slow
def test_terminated_run_says_that_it_resumes(tmp_path):
    teacher, out = save_teacher(tmp_path / "teacher"), tmp_path / "out"
    settings = {"max_steps": 100_000, "save_steps": 1, "bf16": "false", "use_cpu": "true", "calibration_images": 2}
    argv = ["run", "--teacher", teacher, "--dataset", "mnist-digits", "--train-split", "train[:16]", "--output-dir"]
    argv += [str(out), "--eval-split", "test[:8]", "--stages", "attention-alignment"]
    argv += [part for name, value in settings.items() for part in ("--set", f"attention_alignment.{name}={value}")]
    program = subprocess.Popen(
        [sys.executable, "-m", "vit_adala", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    end = time.monotonic() + 300
    while not list(out.glob(f"checkpoints/*/checkpoint-*/{CHECKSUMS}")) and time.monotonic() < end:
        time.sleep(0.1)
    program.terminate()
    printed, said = program.communicate(timeout=60)
    assert program.returncode == 143, said.decode()
    assert printed == b"" and b"Traceback" not in said
    last = said.decode().strip().splitlines()[-1]
    assert last.endswith("vit-adala run: terminated; the same command resumes from the last checkpoint."), last
