"""Nothing of the user's is lost: a command writes inside its output folder, and removes there only what it wrote."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from training_helpers import (
    InterruptAt,
    Interrupted,
    assert_same_tensors,
    save_teacher,
)

import trainers.runs.stages
from modeling_adala import CheckpointError, convert
from trainers.data.digits import load_digits
from trainers.data.sources import describe
from trainers.runs.checkpoints import intact_checkpoint, list_checkpoints
from trainers.runs.output_folder import OutputFolder, is_finished, read_record
from trainers.runs.recipe import run_recipe
from trainers.runs.recipe_config import RecipeConfig
from vit_adala.cli import main

COMMANDS = ("run", "align", "distill", "finetune")
STAGE_COMMANDS = COMMANDS[1:]
TRAINING = {"max-steps": 6, "save-steps": 2, "per-device-train-batch-size": 8, "bf16": "false", "use-cpu": "true"}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    save_teacher(root / "teacher")
    student = convert(str(root / "teacher"), check_parity=False)
    student.config.adala_stage = "attention-alignment"
    student.save_pretrained(root / "student")
    shutil.copy(root / "teacher" / "preprocessor_config.json", root / "student")
    splits = {"train": load_digits("train").select(range(32)), "test": load_digits("test").select(range(0, 1000, 50))}
    datasets.DatasetDict(splits).save_to_disk(root / "digits")
    datasets.DatasetDict(splits | {"train": splits["train"].select(range(16))}).save_to_disk(root / "other-digits")
    return {path.name: path for path in root.iterdir()}


def arguments(command: str, out: Path | str, places: dict[str, Path], **changes) -> list[str]:
    """A command line that works, with options changed or, by `None`, left out."""
    options = {"dataset": places["digits"], "output-dir": out}
    if command == "run":
        options |= {"teacher": places["teacher"], "knn-images": 8, "eval-images": 8}
        options |= {"set": [f"attention_alignment.{n.replace('-', '_')}={v}" for n, v in TRAINING.items()]}
        options["stages"] = "attention-alignment"
    else:
        options |= TRAINING | {"teacher": places["teacher"], "model": places["student"]}
        options.pop({"align": "model", "finetune": "teacher"}.get(command), None)
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    worked_on = {"align": "teacher", "distill": "model", "finetune": "model"}.get(command)
    given = [command] if worked_on is None else [command, str(options.pop(worked_on))]
    for name, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            given += [] if item is None else [f"--{name}", str(item)]
    return given


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with the SHA-256 of its content, links and empty folders too."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()):
            found[name] = "empty"
    return found


def refused(capsys, argv: list[str], *names: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main(argv) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    assert all(name in lines[0] for name in names), (names, lines[0])
    return lines[0]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def stop_at(monkeypatch, step: int) -> None:
    """End training after this step, as a kill between two checkpoints does."""
    train = trainers.runs.stages.AdaLATrainer.train

    def interrupted(self, *args, **kwargs):
        self.add_callback(InterruptAt(step))
        return train(self, *args, **kwargs)

    for trainer in (stage.trainer_class for stage in trainers.runs.stages.STAGES.values()):
        monkeypatch.setattr(trainer, "train", interrupted)


def start_and_stop(argv: list[str], step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            main([*argv, "--debug"])


@pytest.fixture(scope="module")
def uninterrupted(places, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "1"
    assert main(arguments("align", out, places)) == 0
    return out


# --- what is in the way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_folder_with_files_of_anyone_else_is_refused_before_anything_is_read(command, places, tmp_path, capsys):
    (tmp_path / "out" / "chapters").mkdir(parents=True)
    (tmp_path / "out" / "thesis.tex").write_text("the only copy")
    (tmp_path / "out" / "chapters" / "1.tex").write_text("of this, too")
    before = listing(tmp_path)
    missing = {"teacher": "/nowhere/teacher"} if command != "finetune" else {"model": "/nowhere/model"}
    refused(capsys, arguments(command, tmp_path / "out", places, **missing), "'chapters' and 1 more", "output_dir=")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("source", ["teacher", "student", "digits"])
def test_folder_that_is_read_is_never_written(command, source, places, tmp_path, capsys):
    if source not in {
        "run": ("teacher", "digits"),
        "align": ("teacher", "digits"),
        "finetune": ("student", "digits"),
    }.get(command, ("teacher", "student", "digits")):
        pytest.skip("not read by this command")
    copied = {name: Path(shutil.copytree(path, tmp_path / "in" / name)) for name, path in places.items()}
    before = listing(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(copied[source])
    for out in (copied[source], copied[source] / "sub" / "out", copied[source].parent, link):
        refused(capsys, arguments(command, out, copied), "output_dir=")
    link.unlink()
    assert listing(tmp_path) == before


def test_web_manifest_is_not_taken_for_ours(places, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "a web page", "icons": []}')
    refused(capsys, arguments("align", tmp_path / "out", places), "'manifest.json'")


@pytest.mark.parametrize(
    ("out", "names"),
    [
        ("", ("output_dir=''",)),
        (" ", ("output_dir=' '",)),
        ("a\0b", ("output_dir=",)),
        ("file", ("is a file",)),
        ("file/out", ("cannot be",)),
        ("/dev/null", ("is a file",)),
        ("x" * 300, ("too long",)),
        (".", ("'file'",)),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_path_that_cannot_be_a_folder_is_refused(command, out, names, places, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    before = listing(tmp_path)
    refused(capsys, arguments(command, out, places), *names)
    assert listing(tmp_path) == before


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_everything_is_written_inside_the_folder(command, places, tmp_path):
    beside = tmp_path / "checkpoints" / "out" / "checkpoint-2"
    beside.mkdir(parents=True)
    (beside / "mine.txt").write_text("x")
    (tmp_path / "metrics.jsonl").write_text('{"stage": "attention-alignment", "step": 1, "loss": 1}\n')
    before = listing(tmp_path)
    assert main(arguments(command, tmp_path / "out", places)) == 0
    after = listing(tmp_path)
    assert {name: value for name, value in after.items() if not name.startswith("out/")} == before
    assert not any("checkpoints/" in name or "/." in name for name in after if name.startswith("out/"))


def test_two_runs_side_by_side_keep_their_own_figures(places, tmp_path):
    for rate in ("1e-3", "1e-4"):
        assert main(arguments("align", tmp_path / rate, places, learning_rate=rate)) == 0
    for rate in ("1e-3", "1e-4"):
        first = (tmp_path / rate / "metrics.jsonl").read_text().splitlines()[0]
        assert json.loads(first)["step"] == 1
        assert read_record(tmp_path / rate)["settings"]["learning_rate"] == float(rate)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("command", ["align", "run"])
def test_link_to_a_folder_is_followed(command, exists, places, tmp_path):
    if exists:
        (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    assert main(arguments(command, tmp_path / "out", places)) == 0
    assert (tmp_path / "out").is_symlink()
    assert is_finished(tmp_path / "scratch")


def test_manifest_lists_every_file(uninterrupted):
    record = read_record(uninterrupted)
    assert {*record["files"], "manifest.json", "metrics.jsonl"} == set(listing(uninterrupted))
    assert record["status"] == "finished" and record["command"] == "attention-alignment"


def test_files_of_others_in_the_checkpoints_survive_the_end(places, uninterrupted, tmp_path, capsys):
    out, argv = tmp_path / "1", arguments("align", tmp_path / "1", places)
    start_and_stop(argv, step=5)
    (out / "checkpoints" / "mine.txt").write_text("x")
    refused(capsys, argv, "'checkpoints/mine.txt'")
    (out / "checkpoints" / "mine.txt").rename(out / "checkpoints" / "checkpoint-4" / "mine.txt")
    assert main(argv) == 0
    assert [name for name in listing(out) if "checkpoints" in name] == ["checkpoints/checkpoint-4/mine.txt"]
    assert_same_tensors(weights(out), weights(uninterrupted))


def test_from_stage_removes_listed_files_only(places, tmp_path, capsys):
    argv = arguments("run", tmp_path / "out", places)
    assert main(argv) == 0
    stage = tmp_path / "out" / "1-attention-alignment"
    (stage / "notes.txt").write_text("x")
    refused(capsys, [*argv, "--from-stage", "1"], "'1-attention-alignment/notes.txt'")
    assert (stage / "model.safetensors").is_file()


# --- two at once -----------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from trainers.runs.output_folder import OutputFolder
with OutputFolder(sys.argv[1], "attention-alignment", {}).claim():
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_two_processes_on_one_folder_are_kept_apart(places, tmp_path, capsys):
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    try:
        assert holder.stdout.readline() == b"claimed\n"
        before = listing(out)
        with (
            pytest.raises(Exception, match="in use by another process"),
            OutputFolder(out, "attention-alignment", {}).claim(),
        ):
            pass
        assert listing(out) == before
    finally:
        holder.kill()  # the lock goes with the process, whatever ends it
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with OutputFolder(out, "attention-alignment", {}).claim():
        pass
    assert "out/.lock" not in listing(tmp_path)


def test_command_on_a_folder_in_use_says_so(places, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        refused(capsys, arguments("align", tmp_path / "out", places), "in use by another process")


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": "1e-9"}, "learning_rate=0.001"),
        ({"dataset": "@other-digits"}, "dataset="),
        ({"train_split": "train[:8]"}, "train_split='train'"),
        ({"feature_map": "elu"}, "feature_map="),
        ({"softmax_layers": "0"}, "softmax_layers="),
        ({"crop_scale": "0.9"}, "crop_scale=0.5"),
        ({"seed": "7"}, "seed=42"),
        ({"max_steps": "5"}, "max_steps=6"),
        ({"per_device_train_batch_size": "4"}, "per_device_train_batch_size=8"),
    ],
)
def test_other_settings_are_refused_by_name(changes, named, places, tmp_path, capsys):
    out = tmp_path / "1"
    start_and_stop(arguments("align", out, places), step=3)
    before = listing(out)
    changes = {name: places[value[1:]] if value.startswith("@") else value for name, value in changes.items()}
    refused(capsys, arguments("align", out, places, **changes), "output_dir=", named)
    assert listing(out) == before


def test_data_that_changed_in_place_are_refused(places, tmp_path, capsys):
    data, out = shutil.copytree(places["digits"], tmp_path / "data"), tmp_path / "1"
    start_and_stop(arguments("align", out, places, dataset=data), step=3)
    shutil.rmtree(data)
    shutil.copytree(places["other-digits"], data)
    refused(capsys, arguments("align", out, places, dataset=data), "data_fingerprint=")


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[] if name == "distill" else pytest.mark.long) for name in STAGE_COMMANDS]
)
def test_stage_goes_on_with_other_settings_that_do_not_matter(command, places, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert main(arguments(command, whole, places)) == 0
    start_and_stop(arguments(command, out, places), step=5)
    assert main(arguments(command, out, places, save_steps=3, logging_steps=1, per_device_eval_batch_size=2)) == 0
    assert_same_tensors(weights(out), weights(whole))


def test_longer_run_is_honored(places, tmp_path):
    out = tmp_path / "1"
    constant = {"lr_scheduler_type": "constant"}
    start_and_stop(arguments("align", out, places, **constant), step=5)
    assert main(arguments("align", out, places, **constant, max_steps=8)) == 0
    assert main(arguments("align", tmp_path / "whole", places, **constant, max_steps=8)) == 0
    assert_same_tensors(weights(out), weights(tmp_path / "whole"))


def test_more_epochs_than_before_are_trained(places, tmp_path):
    out, epochs = tmp_path / "1", {"max_steps": -1, "lr_scheduler_type": "constant", "save_steps": 4}
    start_and_stop(arguments("align", out, places, **epochs, num_train_epochs=1), step=4)
    assert main(arguments("align", out, places, **epochs, num_train_epochs=2)) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 8


def test_evaluation_that_a_kill_prevented_is_made_up_for(places, tmp_path, capsys, monkeypatch):
    argv = arguments("finetune", tmp_path / "3", places)
    with monkeypatch.context() as patch:
        patch.setattr("vit_adala.commands.finetune.record_evaluation", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*argv, "--debug"])
    before = weights(tmp_path / "3")
    assert main(argv) == 0
    assert "already done" in capsys.readouterr().out
    assert "head_accuracy" in json.loads((tmp_path / "3" / "evaluation.json").read_text())
    assert_same_tensors(weights(tmp_path / "3"), before)


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = {
    **{f"{how.__name__} {name}": (how, name) for how in (truncate, flip, empty) for name in ("model.safetensors",)},
    **{f"{how.__name__} {name}": (how, name) for how in (truncate, flip, empty) for name in ("optimizer.pt",)},
    **{f"{how.__name__} {name}": (how, name) for how in (truncate, empty) for name in ("trainer_state.json",)},
    **{
        f"no {name}": (Path.unlink, name)
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    },
    "flip scheduler.pt": (flip, "scheduler.pt"),
    "flip rng_state.pth": (flip, "rng_state.pth"),
    "truncate checksums.json": (truncate, "checksums.json"),
    "no checksums.json": (Path.unlink, "checksums.json"),
}


@pytest.fixture(scope="module")
def stopped(places, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "1"
    start_and_stop(arguments("align", out, places), step=5)
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["checkpoint-2", "checkpoint-4"]
    return out


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_newest_checkpoint_is_passed_over(case, places, stopped, uninterrupted, tmp_path, caplog):
    out = Path(shutil.copytree(stopped, tmp_path / "1"))
    damage, name = DAMAGE[case]
    damage(out / "checkpoints" / "checkpoint-4" / name)
    assert main(arguments("align", out, places)) == 0
    assert "resuming from step 2" in caplog.text
    assert ("is damaged" in caplog.text) == (case != "no checksums.json")
    assert_same_tensors(weights(out), weights(uninterrupted))


def test_damage_to_all_checkpoints_is_one_line_with_the_way_out(places, stopped, tmp_path, capsys):
    out = Path(shutil.copytree(stopped, tmp_path / "1"))
    for checkpoint in list_checkpoints(out / "checkpoints"):
        flip(checkpoint / "optimizer.pt")
    refused(capsys, arguments("align", out, places), "optimizer.pt has changed", "remove", "start", code=1)
    shutil.rmtree(out / "checkpoints")
    assert main(arguments("align", out, places)) == 0


def test_folder_that_is_no_checkpoint_is_passed_over(stopped, tmp_path):
    work = Path(shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints"))
    (work / "checkpoint-abc").mkdir()
    (work / "checkpoint-99").mkdir()
    assert intact_checkpoint(work) == work / "checkpoint-4"
    shutil.copytree(work / "checkpoint-4", work / "checkpoint-98")
    (work / "checkpoint-98" / "checksums.json").write_text("[]")
    assert intact_checkpoint(work) == work / "checkpoint-4"


def test_manifest_that_cannot_be_read_is_one_line(places, uninterrupted, tmp_path, capsys):
    for content in ("{", "[]", "\x00"):
        out = Path(shutil.copytree(uninterrupted, tmp_path / "1", dirs_exist_ok=True))
        (out / "manifest.json").write_text(content)
        refused(capsys, arguments("align", out, places), "manifest.json cannot be read", "another output_dir", code=1)
    with pytest.raises(CheckpointError):
        read_record(out)


def test_damage_to_a_finished_run_is_repaired_or_named(places, tmp_path, capsys):
    out, argv = tmp_path / "out", arguments("run", tmp_path / "out", places)
    assert main(argv) == 0
    (out / "config.yaml").write_text("teacher: [")
    (out / "metrics.jsonl").write_bytes(b"\xb4\xff\n{}\n[")
    (out / "speed.json").write_text("{")
    (out / "report.md").unlink()
    assert main(argv) == 0
    assert (out / "report.md").is_file() and json.loads((out / "speed.json").read_text())["rows"]
    assert RecipeConfig.from_yaml(out / "config.yaml").output_dir == str(out)
    truncate(out / "1-attention-alignment" / "model.safetensors")
    refused(capsys, argv, "does not open", "--from-stage 1", code=1)
    assert main([*argv, "--from-stage", "1"]) == 0
    (out / "1-attention-alignment" / "model.safetensors").unlink()
    refused(capsys, argv, "--from-stage 1", code=1)


def test_recipe_takes_a_dataset_in_memory(places, tmp_path):
    data = datasets.load_from_disk(str(places["digits"]))
    sections = {"attention_alignment": {name.replace("-", "_"): value for name, value in TRAINING.items()}}
    sections["attention_alignment"] |= {"bf16": False, "use_cpu": True}
    settings = {"teacher": str(places["teacher"]), "output_dir": str(tmp_path / "out"), "knn_images": 8}
    config = RecipeConfig(dataset=data, stages=["attention-alignment"], eval_images=8, **settings, **sections)
    assert run_recipe(config).is_file()
    assert f"dataset: {describe(data)}\n" in (tmp_path / "out" / "config.yaml").read_text()
    assert run_recipe(config).is_file()  # and goes on from there
