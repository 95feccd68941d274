"""`vit-adala`: every mistake is one line that names it and the way out, and leaves nothing behind."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
import pytest
import yaml
from safetensors.torch import load_file
from training_helpers import assert_same_tensors, one_thread, save_teacher  # noqa: F401
from transformers import (
    BertConfig,
    PreTrainedModel,
    SchedulerType,
    SwinConfig,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import trainers.report
from modeling_adala import AdaLAViTForImageClassification, UsageError, convert
from trainers.base_config import AdaLATrainingArguments
from trainers.data_config import DataConfig
from trainers.digits import load_digits
from trainers.output_folder import OutputFolder
from trainers.recipe_config import RecipeConfig
from trainers.settings import fit_type
from trainers.stages import STAGES
from vit_adala.arguments import parse_settings
from vit_adala.cli import COMMANDS, main

# these train or evaluate on images; the others have tests of their own
ON_DATA = [command for command in COMMANDS if command not in ("doctor", "push", "inspect", "features", "bench")]
FOLDERS = [stage.directory for stage in STAGES.values()]
ALIGNED, DISTILLED, FINETUNED = FOLDERS
TRAINING = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 8, "bf16": "false", "use_cpu": "true"}
QUICK_STAGE = [f"attention_alignment.{name}={value}" for name, value in TRAINING.items()]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """What the commands of the tests name as `@name`."""
    root = tmp_path_factory.mktemp("places")
    teacher = save_teacher(root / "teacher")
    deep = save_teacher(root / "deep", layers=3)
    for name, stock, stage in (
        ("student", teacher, None),
        ("deep-student", deep, None),
        ("done", teacher, "supervised"),
    ):
        student, _ = convert(stock, check_parity=False)
        student.config.adala_stage = stage or "attention-alignment"
        student.save_pretrained(root / name)
        shutil.copy(f"{stock}/preprocessor_config.json", root / name)
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(root / "bert")
    SwinConfig(embed_dim=8, depths=[1], num_heads=[1]).save_pretrained(root / "swin")
    digits = datasets.DatasetDict(
        train=load_digits("train").select(range(64)), test=load_digits("test").select(range(0, 1000, 31))
    )
    digits.save_to_disk(root / "digits")
    digits["train"].select_columns("image").save_to_disk(root / "unlabeled")
    (root / "nothing").mkdir()
    (root / "unknown-type").mkdir()
    (root / "unknown-type" / "config.json").write_text('{"model_type": "vit-of-tomorrow"}')
    images = root / "broken-images" / "train"
    images.mkdir(parents=True)
    for index, row in enumerate(digits["train"].select(range(50))):
        row["image"].save(images / f"{index:02}.png")
    for index in (3, 20, 30):
        (images / f"{index:02}.png").write_bytes(b"no image")
    (root / "no-yaml.yaml").write_text("teacher: [1, 2\nx")
    (root / "list.yaml").write_text("- teacher\n- dataset\n")
    (root / "typo.yaml").write_text("teacher: here\nleraning_rate: 1\n")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def out(tmp_path) -> Path:
    """The folder of a run. It is not there before."""
    return tmp_path / "out"


def arguments(command: str, out: Path, places: dict[str, str], **changes) -> list[str]:
    """A command that works, with changes: `None` drops an option, a list gives it several times."""
    data = {"dataset": "@digits"}
    counts = {"knn-images": 16, "eval-images": 8}
    defaults = {
        "run": {"recipe": None, "teacher": "@teacher", **data, "output-dir": out, **counts, "set": QUICK_STAGE},
        "align": {"teacher": "@teacher", **data, "output-dir": out / ALIGNED, **TRAINING},
        "distill": {"model": "@student", "teacher": "@teacher", **data, "output-dir": out / DISTILLED, **TRAINING},
        "finetune": {"model": "@student", **data, "output-dir": out / FINETUNED, **TRAINING},
        "evaluate": {"model": "@student", "teacher": "@teacher", **data, **counts},
    }
    given = [command]
    for index, (name, value) in enumerate((defaults[command] | changes).items()):
        for item in value if isinstance(value, list) else [value]:
            option = [] if index == 0 else ["--" + name]  # the first is positional
            given += [] if item is None else [*option, str(item)]
    return [places[part[1:]] if part.startswith("@") else part for part in given]


@pytest.fixture
def refused(capsys, caplog, out):
    """Runs a command that must fail in one line and leave nothing. Returns the line."""

    def run(code: int, argv: list[str], names: tuple[str, ...], logs: bool = False) -> str:
        caplog.clear()
        assert main(argv) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert "Traceback" not in lines[0]
        if argv and argv[0] in COMMANDS:
            assert lines[0].startswith(f"vit-adala {argv[0]}: ")
        missing = [name for name in names if name not in lines[0]]
        assert not missing, f"{missing} not in {lines[0]!r}"
        # under pytest, log lines go to caplog instead of stderr
        assert logs or not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert not out.exists() or logs
        return lines[0]

    return run


# --- wrong usage and what fails for other reasons --------------------------------------------------------------------

# command, changes, exit code, what the line names: argument, value, way out
REFUSED = {
    # the student
    "unknown feature map": ("align", {"feature_map": "gelu"}, 2, ("feature_map='gelu'", "elu, exp, hedgehog")),
    "unknown feature map of a run": ("run", {"feature-map": "gelu"}, 2, ("feature_map='gelu'", "elu, exp")),
    "feature map that looks like a number": ("run", {"feature-map": "1"}, 2, ("feature_map='1'", "elu, exp")),
    "option the feature map lacks": (
        "align",
        {"feature_map": "elu", "feature_map_kwargs": '{"sharpness": 2}'},
        2,
        ("feature_map_kwargs", "sharpness", "'elu'"),
    ),
    "option the feature map of a run lacks": (
        "run",
        {"feature-map": "elu", "feature-map-kwargs": '{"sharpness": 2}'},
        2,
        ("feature_map_kwargs", "sharpness", "'elu'"),
    ),
    "feature map options that are a text": (
        "align",
        {"feature_map_kwargs": "scale 2"},
        2,
        ("feature_map_kwargs='scale 2'", "a mapping"),
    ),
    "feature map options that are a number": (
        "run",
        {"feature-map-kwargs": "3"},
        2,
        ("feature_map_kwargs='3'", "a mapping"),
    ),
    "softmax layer out of range": ("align", {"softmax_layers": 2}, 2, ("softmax_layers=[2]", "layers 0 to 1")),
    "softmax layer of a run out of range": ("run", {"softmax-layers": -3}, 2, ("softmax_layers=[-3]", "0 to 1")),
    "softmax layer of a run that is a word": ("run", {"softmax-layers": "last"}, 2, ("'last'", "an integer")),
    "LoRA rank 0": ("distill", {"lora_r": 0}, 2, ("lora_r=0", "1 or more")),
    "blocks that are not there": ("distill", {"hidden_states": 7}, 2, ("hidden_states=[7]", "layers 0 to 1")),
    # the teacher and its student
    "no teacher": ("align", {"teacher": None}, 2, ("TEACHER", "--help")),
    "no teacher of a student": (
        "distill",
        {"teacher": None},
        2,
        ("teacher is missing", "linear student", "--teacher"),
    ),
    "feature map of a student": ("distill", {"feature_map": "elu"}, 2, ("feature_map='elu'", "leave it out")),
    "no teacher of a run": ("run", {"teacher": None}, 2, ("teacher is missing", "Hub id")),
    "teacher without images": ("align", {"teacher": "@bert"}, 2, ("'bert'", "vit, deit")),
    "teacher of another family": ("align", {"teacher": "@swin"}, 2, ("'swin'", "vit, deit")),
    "teacher without images to distill": ("distill", {"teacher": "@bert"}, 2, ("'bert'", "vit, deit")),
    "teacher of another family to distill": ("distill", {"teacher": "@swin"}, 2, ("'swin'", "vit, deit")),
    "teacher of another family to evaluate": ("evaluate", {"teacher": "@swin"}, 2, ("'swin'", "vit, deit")),
    "teacher of another family to run": ("run", {"teacher": "@swin"}, 2, ("'swin'", "vit, deit")),
    "classifier without images": ("finetune", {"model": "@bert"}, 2, ("'bert'", "vit, deit")),
    "unknown model type": ("align", {"teacher": "@unknown-type"}, 1, ("unknown-type", "vit-of-tomorrow")),
    **{
        f"student as the teacher to {command}": (command, {"teacher": "@student"}, 2, ("student'", "softmax model"))
        for command in ("run", "align", "distill", "evaluate")
    },
    "student of another depth to distill": (
        "distill",
        {"model": "@deep-student"},
        2,
        ("num_hidden_layers (3 and 2)", "pass the teacher"),
    ),
    "student of another depth to evaluate": (
        "evaluate",
        {"model": "@deep-student"},
        2,
        ("num_hidden_layers (3 and 2)", "pass the teacher"),
    ),
    "softmax model with another teacher": (
        "distill",
        {"model": "@teacher", "teacher": "@deep"},
        2,
        ("teacher=", "its own teacher", "leave --teacher out"),
    ),
    "softmax model as the student to evaluate": ("evaluate", {"model": "@teacher"}, 2, ("'vit'", "convert it first")),
    "result of stage 3 to distill": (
        "distill",
        {"model": "@done"},
        2,
        ("'supervised'", "'attention-alignment'", "Pass that folder"),
    ),
    **{
        f"no checkpoint to {command}": (command, {"model": "@nothing"}, 1, ("nothing'", "config.json"))
        for command in ("distill", "finetune", "evaluate")
    },
    **{
        f"unknown teacher to {command}": (command, {"teacher": "nobody/nothing"}, 1, ("'nobody/nothing'", "offline"))
        for command in ("run", "align", "distill", "evaluate")
    },
    "unknown classifier": ("finetune", {"model": "nobody/nothing"}, 1, ("'nobody/nothing'", "offline")),
    # the data
    **{
        f"no data to {command}": (command, {"dataset": None}, 2, ("dataset is missing", "mnist-digits"))
        for command in ON_DATA
    },
    **{
        f"unknown data to {command}": (command, {"dataset": "nobody/nothing"}, 1, ("'nobody/nothing'", "network"))
        for command in ON_DATA
    },
    "folder that is not there": ("align", {"dataset": "./no/such"}, 1, ("'./no/such'", "check the path")),
    "folder without images": ("align", {"dataset": "@nothing"}, 1, ("nothing'", "give a folder of images")),
    **{
        f"no such image column to {command}": (
            command,
            {"image_column": "img"},
            2,
            ("image_column='img'", "image, label"),
        )
        for command in ON_DATA
    },
    "no such label column": ("finetune", {"label_column": "cls"}, 2, ("label_column='cls'", "image, label")),
    "no such label column of a run": (
        "run",
        {"label_column": "cls", "set": "supervised.max_steps=1"},
        2,
        ("label_column='cls'", "image, label"),
    ),
    "no labels at all": (
        "finetune",
        {"dataset": "@unlabeled"},
        2,
        ("label_column='label'", "one subfolder per class"),
    ),
    "no such split": ("align", {"train_split": "training"}, 2, ("split='training'", "train, test")),
    "no such evaluation split": ("evaluate", {"eval_split": "val"}, 2, ("split='val'", "train, test")),
    "no split to evaluate on": ("evaluate", {"dataset": "@unlabeled"}, 2, ("unlabeled'", "--eval-split")),
    "no such split of a run": ("run", {"train-split": "training"}, 2, ("split='training'", "train, test")),
    "empty split": ("align", {"train_split": "train[:0]"}, 1, ("'train[:0]'", "choose another")),
    "empty split of a run": ("run", {"train-split": "train[:0]"}, 1, ("'train[:0]'", "choose another")),
    **{
        f"image size beside the patch to {command}": (command, {"image_size": 30}, 2, ("image_size=30", "28 or 35"))
        for command in ON_DATA
    },
    "crop of nothing": ("align", {"crop_scale": 0}, 2, ("crop_scale=0.0", "above 0")),
    "no images to evaluate on": ("evaluate", {"eval-images": 0}, 2, ("eval_images=0", "1 or more")),
    "fewer images than none": ("run", {"knn-images": -1}, 2, ("knn_images=-1", "1 or more")),
    # the settings
    "unknown option": ("align", {"learningrate": 1}, 2, ("--learningrate", "'--learning-rate'", "align --help")),
    "unknown option of a run": ("run", {"learning-rate": 1}, 2, ("--learning-rate", "vit-adala run --help")),
    "unknown task": ("finetune", {"task": "depth"}, 2, ("task='depth'", "image-classification")),
    "unknown loss": ("distill", {"loss": "l1"}, 2, ("loss='l1'", "mse, cosine")),
    "unknown schedule": ("align", {"lr_scheduler_type": "sine"}, 2, ("lr_scheduler_type='sine'", "'cosine'")),
    "unknown setting of a run": ("run", {"set": "nonsense=1"}, 2, ("nonsense", "vit-adala run --help")),
    "unknown setting of a stage": (
        "run",
        {"set": "attention_alignment.nonsense=1"},
        2,
        ("attention_alignment.nonsense", "AttentionAlignmentConfig", "leave it out"),
    ),
    "output folder of a stage": (
        "run",
        {"set": "supervised.output_dir=x"},
        2,
        ("supervised.output_dir", "the recipe's own output_dir"),
    ),
    "setting without a value": ("run", {"set": "max_steps"}, 2, ("--set 'max_steps'", "NAME=VALUE")),
    "setting without a name": ("run", {"set": "=3"}, 2, ("--set '=3'", "NAME=VALUE")),
    "setting with an empty part": ("run", {"set": "supervised..x=3"}, 2, ("--set 'supervised..x=3'", "NAME=VALUE")),
    "setting that is no YAML": ("run", {"set": "stages=[1"}, 2, ("--set 'stages=[1'", "quotes")),
    "setting that is value and section": ("run", {"set": ["seed=1", "seed.x=2"]}, 2, ("--set 'seed.x=2'", "either")),
    "section that is a number": ("run", {"set": "supervised=3"}, 2, ("supervised=3", "a mapping")),
    "word for a number": ("align", {"learning_rate": "abc"}, 2, ("learning_rate='abc'", "a number")),
    "word for a number in a setting": (
        "run",
        {"set": "attention_alignment.learning_rate=abc"},
        2,
        ("attention_alignment.learning_rate='abc'", "a number"),
    ),
    "fraction of a step": ("run", {"set": "supervised.max_steps=2.5"}, 2, ("supervised.max_steps=2.5", "an integer")),
    **{
        f"word for an image size to {command}": (command, {"image_size": "abc"}, 2, ("image_size='abc'", "integer"))
        for command in ON_DATA
    },
    "word for a crop of a run": ("run", {"crop-scale": "abc"}, 2, ("crop_scale='abc'", "a number")),
    "word for a seed of a run": ("run", {"seed": "abc"}, 2, ("seed='abc'", "an integer")),
    "word for a switch": ("align", {"streaming": "maybe"}, 2, ("--streaming", "'maybe'", "true or false")),
    "word for a switch of a run": ("run", {"streaming": "maybe"}, 2, ("--streaming", "'maybe'", "true or false")),
    "negative learning rate": ("align", {"learning_rate": -1}, 2, ("learning_rate=-1", "0 or more")),
    "negative learning rate of a run": (
        "run",
        {"set": "feature_alignment.learning_rate=-1"},
        2,
        ("feature_alignment.learning_rate=-1", "0 or more"),
    ),
    "package that an option needs": ("align", {"deepspeed": "x.json"}, 2, ("deepspeed",)),
    # the recipe and its stages
    "recipe that is not there": ("run", {"recipe": "./nowhere.yaml"}, 2, ("'./nowhere.yaml'", "No such file")),
    "recipe that is no YAML": ("run", {"recipe": "@no-yaml.yaml"}, 2, ("no-yaml.yaml'", "could not be read")),
    "recipe that is a list": ("run", {"recipe": "@list.yaml"}, 2, ("list.yaml'", "name: value")),
    "recipe with a typo": ("run", {"recipe": "@typo.yaml"}, 2, ("'leraning_rate'", "vit-adala run --help")),
    "unknown stage": ("run", {"stages": "alignment"}, 2, ("stages=['alignment']", "attention-alignment")),
    "stages out of order": (
        "run",
        {"stages": "[feature-alignment, attention-alignment]"},
        2,
        ("stages=['feature-alignment', 'attention-alignment']", "in the order"),
    ),
    "stage twice": ("run", {"stages": "supervised,supervised"}, 2, ("stages=['supervised', 'supervised']", "once")),
    "stage out of range": ("run", {"from-stage": 4}, 2, ("from_stage=4", "[1, 2]")),
    "stage 0": ("run", {"from-stage": 0}, 2, ("from_stage=0", "[1, 2]")),
    "stage that is a word": ("run", {"from-stage": "last"}, 2, ("from_stage='last'", "an integer")),
    "stage whose predecessor is missing": ("run", {"from-stage": 2}, 2, ("from_stage=2", ALIGNED, "start at 1")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistake_is_refused_in_one_line_and_leaves_nothing(refused, places, out, case):
    command, changes, code, names = REFUSED[case]
    refused(code, arguments(command, out, places, **changes), names)


def test_unknown_command_names_those_that_exist(refused):
    refused(2, ["train", "--teacher", "x"], ("'train'", *COMMANDS))


def test_modules_that_lora_does_not_find_are_refused(refused, places, out):
    argv = arguments("distill", out, places, lora_r=2, lora_target_modules="query")
    refused(2, argv, ("lora_target_modules=['query']", "q_proj"))


def test_option_without_its_value_is_refused(refused, places, out):
    for command in ON_DATA:
        refused(2, [*arguments(command, out, places), "--image-size"], ("--image-size", "expected a value"))


def test_debug_shows_where(places, out):
    with pytest.raises(UsageError):
        main([*arguments("align", out, places, feature_map="gelu"), "--debug"])


def test_corrupt_images_end_the_run_with_their_count(refused, places, out):
    argv = arguments("align", out, places, dataset="@broken-images")
    refused(1, argv, ("of 50 images", "max_broken_fraction=0.01", "repair or remove"), logs=True)
    assert not (out / ALIGNED).exists() and not leftovers(out)


def test_output_dir_of_another_run_is_refused_and_left_alone(refused, places, out, tmp_path):
    other = tmp_path / "other"
    settings = {"teacher": places["teacher"], "dataset": places["digits"], "image_size": 56}
    folder = OutputFolder(other, "run", RecipeConfig(**settings, output_dir=str(other)).to_dict())
    with folder.claim():
        folder.write_record("finished")
    before = (other / "manifest.json").read_text()
    argv = arguments("run", out, places, **{"output-dir": other, "knn-images": None, "eval-images": None, "set": None})
    line = refused(2, argv, (f"output_dir={str(other)!r}", "image_size=56", "another output_dir"))
    assert "--from-stage" not in line  # it would not help
    argv += ["--image-size", "56", "--set", "feature_alignment.max_steps=3"]
    refused(2, argv, ("feature_alignment={}", "--from-stage 2"))
    assert [path.name for path in other.iterdir()] == ["manifest.json"]
    assert (other / "manifest.json").read_text() == before


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.endswith(".writing")]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The disk is full at the end of a stage, after its last checkpoint to resume from."""
    save_pretrained = PreTrainedModel.save_pretrained

    def save_and_fail(self, directory, **kwargs):
        save_pretrained(self, directory, **kwargs)
        if not Path(directory).name.startswith("checkpoint-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", save_and_fail)
        yield


@pytest.mark.parametrize("command", ["align", "run"])
def test_full_disk_at_the_end_of_a_stage_leaves_nothing_but_checkpoints(refused, places, out, command):
    with full_disk():
        names = (str(out / ALIGNED), "disk is full", "free some space", "same command")
        refused(1, arguments(command, out, places), names, logs=True)
    assert not leftovers(out)
    work = out / "checkpoints" / ALIGNED if command == "run" else out / ALIGNED / "checkpoints"
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert not list((out / ALIGNED).glob("*.safetensors"))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_same_command_goes_on_where_a_full_disk_stopped_it(places, out, capsys, caplog, schedule):
    argv = arguments("align", out, places, lr_scheduler_type=schedule)
    with full_disk():
        assert main(argv) == 1
    trained = load_file(out / ALIGNED / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert main(argv) == 0
    assert "resuming from step 2" in caplog.text
    assert "stage 1, attention-alignment: " in capsys.readouterr().out
    assert_same_tensors(load_file(out / ALIGNED / "model.safetensors"), trained)
    assert AdaLAViTForImageClassification.from_pretrained(out / ALIGNED).config.adala_stage == "attention-alignment"
    assert not (out / ALIGNED / "checkpoints").exists()


def test_wrong_data_of_a_run_do_not_stand_in_the_way_of_right_ones(refused, places, out, monkeypatch):
    refused(2, arguments("run", out, places, **{"train-split": "training"}), ("split='training'",))
    ran = []
    monkeypatch.setattr("trainers.recipe._Run.run", lambda self: ran.append(self.config) or self.out / "report.md")
    assert main(arguments("run", out, places)) == 0
    assert ran and (out / "manifest.json").is_file()


# --- help ------------------------------------------------------------------------------------------------------------


def helped(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def options_of(text: str) -> list[str]:
    """The options of a help text, in order."""
    found = re.findall(r"^  (?:-\w(?: VALUE)?, )?(--?[\w-]+)", text, flags=re.MULTILINE)
    return [name.removeprefix("--") for name in found]


@pytest.mark.parametrize("command", ON_DATA)
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_fits_and_spells_every_option_one_way(capsys, command, flag):
    text = helped(capsys, command, flag)
    positional = {"run": "[RECIPE.yaml]", "align": "TEACHER", "evaluate": "MODEL --teacher VALUE"}.get(
        command, "MODEL"
    )
    assert text.startswith(f"usage: vit-adala {command} {positional} [options]\n")
    assert "example: vit-adala " in text
    too_long = [line for line in text.splitlines() if len(line) > 100]
    assert not too_long
    options = options_of(text)
    assert {"help-all", "dataset", "image-size"} <= set(options)
    assert not [name for name in options if "_" in name]
    assert len(options) == len(set(options))


@pytest.mark.parametrize("stage, command", list(zip(STAGES.values(), ("align", "distill", "finetune"))))
def test_help_has_our_options_first_and_the_inherited_ones_on_demand(capsys, stage, command):
    refused = {name.replace("_", "-") for name in AdaLATrainingArguments.NOT_OFFERED}
    inherited = {field.name.replace("_", "-") for field in dataclasses.fields(TrainingArguments)} - refused
    ours = {
        field.name.replace("_", "-") for kind in (stage.config_class, DataConfig) for field in dataclasses.fields(kind)
    } - refused
    short, full = (options_of(helped(capsys, command, flag)) for flag in ("--help", "--help-all"))
    assert ours - inherited <= set(short)
    for options in (short, full):
        first = next(index for index, name in enumerate(options) if name in inherited)
        assert not [name for name in options[:first] if name in inherited]
        assert not set(options[first:]) & (ours - inherited)
    assert {"output-dir", "learning-rate", "max-steps", "per-device-train-batch-size", "bf16"} <= set(short)
    assert inherited - set(short) and inherited <= set(full)
    assert "fsdp" in full and "fsdp" not in short
    assert not refused & set(full)


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_help_of_commands_without_a_trainer_has_nothing_of_it(capsys, command):
    assert "fsdp" not in helped(capsys, command, "--help-all")


@pytest.mark.parametrize("spelling", ["--image-size", "--image_size"])
@pytest.mark.parametrize("command", ON_DATA)
def test_hyphens_and_underscores_are_the_same(refused, places, out, command, spelling):
    refused(2, [*arguments(command, out, places), spelling, "29"], ("image_size=29", "28 or 35"))


def test_overview_names_every_command_and_needs_no_torch():
    code = "import sys; from vit_adala.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for start in (["-c", code, "--help"], ["-m", "vit_adala", "--help"]):
        done = subprocess.run([sys.executable, *start], capture_output=True, text=True, timeout=60, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(f"  {command} " in done.stdout for command in COMMANDS)
        assert max(map(len, done.stdout.splitlines())) <= 120


def test_nothing_at_all_shows_the_overview_as_wrong_usage(capsys):
    assert main([]) == 2
    assert "usage: vit-adala COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert re.fullmatch(r"vit-adala \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_read_as_yaml():
    pairs = [
        "a=1e-4",
        "b=1e3",
        "c=0.5",
        "d=3",
        "e=true",
        "f=text",
        "g=[1, 2]",
        "h=",
        "i={x: 1}",
        "j=train[:500]",
        "k=a=b",
        "l=no",
        "m=2024-01-01",
        "n=010",
    ]
    expected = {
        "a": 1e-4,
        "b": 1000.0,
        "c": 0.5,
        "d": 3,
        "e": True,
        "f": "text",
        "g": [1, 2],
        "h": None,
        "i": {"x": 1},
    }
    settings = parse_settings(pairs)
    assert settings == expected | {"j": "train[:500]", "k": "a=b", "l": "no", "m": "2024-01-01", "n": 10}
    assert isinstance(settings["a"], float) and isinstance(settings["d"], int)
    assert parse_settings(["f=nan", "g=infinity"]) == {"f": "nan", "g": "infinity"}  # words, unless .nan and .inf


def test_dotted_settings_nest_and_the_last_one_wins():
    pairs = ["stage.max_steps=1", "stage.deep.x=2", "seed=3", "stage.max_steps=4"]
    assert parse_settings(pairs) == {"stage": {"max_steps": 4, "deep": {"x": 2}}, "seed": 3}
    assert parse_settings([]) == {}


@pytest.mark.parametrize(
    "value, hint, expected",
    [
        ("1e-4", float, 1e-4),
        (1, float, 1.0),
        (2e3, int, 2000),
        ("8", int, 8),
        (None, int | None, None),
        (3, list[int], [3]),
        ("0,1", list[int], [0, 1]),
        ("a, b", list[str], ["a", "b"]),
        ("0 1", list[int], [0, 1]),
        ("[-1, 2]", list[int], [-1, 2]),
        ("[]", list[int] | None, []),
        (None, list[int], []),
        (None, list[int] | None, None),
        (None, dict, {}),
        ("{scale: 2}", dict, {"scale": 2}),
        ('{"scale": 1e-1}', dict, {"scale": 0.1}),
        ("yes", bool, True),
        ("False", bool, False),
        ("none", int | None, None),
        ("none", str | None, "none"),
        ("12345678901234567891", int, 12345678901234567891),
        ("wandb,trackio", str | list[str] | None, ["wandb", "trackio"]),
        ("cosine", SchedulerType | str, "cosine"),
        ("x", str | dict | None, "x"),
        (Path("x"), str, Path("x")),
    ],
)
def test_values_become_what_a_field_declares(value, hint, expected):
    fitted = fit_type("name", value, hint)
    assert fitted == expected and type(fitted) is type(expected)


@pytest.mark.parametrize(
    "value, hint",
    [
        (True, int),
        (True, float),
        (1.5, int),
        ("x", float),
        (7, str),
        (1, bool),
        ("maybe", bool),
        ("a", list[int]),
        ("0;1", list[int]),
        ([], int),
        (float("inf"), int),
        ("[1]", dict),
        ("a: b: c", dict),
        ("1" * 5000, int),
    ],
)
def test_values_that_do_not_fit_a_field_are_refused(value, hint):
    with pytest.raises(UsageError, match=r"^some\.name=.* must be "):
        fit_type("some.name", value, hint)


@pytest.fixture
def configs(monkeypatch) -> list[RecipeConfig]:
    """Catches what `run` would run."""
    caught: list[RecipeConfig] = []

    def run_recipe(config, from_stage):
        caught.append(config)
        return Path("report.md")

    monkeypatch.setattr("vit_adala.commands.run.run_recipe", run_recipe)
    return caught


def test_flags_win_over_set_and_set_wins_over_the_recipe(configs, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "teacher: a\ndataset: b\nseed: 1\nimage_size: 28\nknn_images: 100\ncrop_scale: 1\n"
        "feature_alignment:\n  max_steps: 5\n  learning_rate: 1e-3\nsupervised:\n"
    )
    sets = ("seed=2", "image_size=56", "feature_alignment.max_steps=6")
    argv = ["run", str(recipe), *(part for item in sets for part in ("--set", item)), "--image-size", "84"]
    assert main(argv) == 0
    config = configs[0]
    assert (config.teacher, config.dataset, config.knn_images, config.crop_scale) == ("a", "b", 100, 1.0)
    assert (config.seed, config.image_size) == (2, 84)
    # a setting of a section leaves the others of it alone
    assert config.feature_alignment == {"max_steps": 6, "learning_rate": 1e-3}
    assert config.supervised == {}


def test_texts_of_flags_are_not_read_as_yaml(configs):
    argv = ["run", "--teacher", "2024-01-01", "--dataset", "a: #b", "--output-dir", "1e4", "--image-column", "null"]
    assert main(argv) == 0
    config = configs[0]
    assert (config.teacher, config.dataset, config.output_dir, config.image_column) == tuple(argv[2::2])


def test_lists_of_a_run_need_no_brackets(configs):
    argv = ["run", "--teacher", "a", "--dataset", "b", "--softmax-layers", "-1", "--stages", "attention-alignment"]
    assert main(argv) == 0
    assert (configs[0].softmax_layers, configs[0].stages) == ([-1], ["attention-alignment"])


def test_recipe_runs(places, out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainers.report, "measure_speed", partial(trainers.report.measure_speed, budget=0.0))
    recipe = tmp_path / "recipe.yaml"
    settings = {"teacher": places["teacher"], "dataset": places["digits"], "output_dir": str(out), "knn_images": 16}
    steps = {"max_steps": 1, "bf16": False, "use_cpu": True}
    settings |= {"eval_images": 8, "stages": ["attention-alignment"], "attention_alignment": steps}
    recipe.write_text(yaml.safe_dump(settings))
    assert main(["run", str(recipe), "--set", "attention_alignment.max_steps=2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'report.md'}"
    assert json.loads((out / "manifest.json").read_text())["stages"]["attention-alignment"]["steps"] == 2
    assert {ALIGNED, "report.md", "config.yaml", "metrics.jsonl"} <= {path.name for path in out.iterdir()}


# --- the stages one by one -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(places, tmp_path_factory) -> Path:
    """Stages 1 to 3 by their commands, on the built-in digits."""
    out = tmp_path_factory.mktemp("chain")
    data = {"dataset": "mnist-digits", "train-split": "train[:64]", "eval-split": "test[:32]"}
    assert main(arguments("align", out, places, **data)) == 0
    assert main(arguments("distill", out, places, **data, model=out / ALIGNED)) == 0
    assert main(arguments("finetune", out, places, **data, model=out / DISTILLED)) == 0
    return out


def test_chain_leaves_a_whole_checkpoint_per_stage(chain):
    assert sorted(path.name for path in chain.iterdir()) == FOLDERS
    assert not leftovers(chain)
    for stage in STAGES.values():
        model = AdaLAViTForImageClassification.from_pretrained(chain / stage.directory)
        assert model.config.adala_stage == stage.name
        processor = ViTImageProcessorPil.from_pretrained(chain / stage.directory)
        assert processor.size["height"] == 28


def test_every_stage_ends_with_a_line_of_truth(places, out, capsys):
    for number, (command, stage) in enumerate(zip(("align", "distill", "finetune"), STAGES), 1):
        assert main(arguments(command, out, places)) == 0
        lines = capsys.readouterr().out.splitlines()
        pattern = (
            rf"stage {number}, {stage}: 2 steps in \d+ s, at most \d+\.\d GiB of memory, 64 images,"
            rf" 0 skipped as unreadable; saved {out}/{number}-"
        )
        assert re.match(pattern, lines[0])
        assert len(lines) == (2 if command == "finetune" else 1)
    assert re.fullmatch(r"accuracy [01]\.\d{4} on 33 images", lines[-1])


def test_evaluate_prints_json_and_nothing_else(chain, places, out, capsys):
    data = {"train-split": "train[:48]", "knn-images": 40, "eval-images": 16, "json": "true"}
    assert main(arguments("evaluate", out, places, **data, model=chain / DISTILLED)) == 0
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err

    def fail(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    results = json.loads(captured.out, parse_constant=fail)
    pairs = ("knn_accuracy", "linear_probe_accuracy")
    assert {f"{model}_{name}" for model in ("teacher", "student") for name in pairs} <= set(results)
    names = {"cls_cosine", "patch_mean_cosine", "patches_cosine", "relative_error", "cls_relative_error"}
    names |= {"head_accuracy", "teacher_head_accuracy", "knn_retention", "num_eval_images", "num_train_images"}
    assert names <= set(results)
    assert (results["num_eval_images"], results["num_train_images"], len(results["block_errors"])) == (16, 40, 2)
    assert -1 <= results["cls_cosine"] <= 1 and results["relative_error"] > 0


def test_evaluate_prints_a_table(chain, places, out, capsys):
    assert main(arguments("evaluate", out, places, model=chain / DISTILLED)) == 0
    text = capsys.readouterr().out
    assert "student" in text and "teacher" in text and "cls_cosine" in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


@pytest.mark.parametrize("teacher", [None, "@teacher"])
def test_distill_converts_a_softmax_model_which_is_its_own_teacher(places, out, teacher):
    options = {"feature_map": "elu", "softmax_layers": "0"}
    assert main(arguments("distill", out, places, model="@teacher", teacher=teacher, **options)) == 0
    student = AdaLAViTForImageClassification.from_pretrained(out / DISTILLED)
    assert student.config.adala_stage == "feature-alignment"
    assert student.config.teacher_name_or_path == Path(places["teacher"]).name
    assert (student.config.feature_map, student.config.softmax_layers) == ("elu", [0])


def test_distill_with_adapters_leaves_a_plain_model(places, out):
    assert main(arguments("distill", out, places, lora_r=2, learning_rate=0.1)) == 0
    assert not list((out / DISTILLED).glob("adapter*"))
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (places["student"], out / DISTILLED))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert any("q_proj" in name for name in changed)
    assert all("_proj.weight" in name or ".fc" in name for name in changed)
    student = AdaLAViTForImageClassification.from_pretrained(out / DISTILLED)
    assert student.config.adala_stage == "feature-alignment"


def test_finetune_takes_the_softmax_teacher_as_the_baseline(places, out, capsys):
    assert main(arguments("finetune", out, places, model="@teacher")) == 0
    assert "accuracy " in capsys.readouterr().out
    model = ViTForImageClassification.from_pretrained(out / FINETUNED)
    assert (model.config.model_type, model.config.num_labels) == ("vit", 10)
    assert not hasattr(model.config, "adala_stage")


def test_same_stage_again_says_that_it_is_done(places, out, capsys):
    for command, folder in zip(("align", "distill", "finetune"), FOLDERS):
        assert main(arguments(command, out, places)) == 0
        before = {path: path.stat().st_mtime_ns for path in (out / folder).rglob("*")}
        capsys.readouterr()
        assert main(arguments(command, out, places)) == 0
        assert re.fullmatch(rf"stage \d, [a-z-]+: already done, in {out / folder}\n", capsys.readouterr().out)
        assert {path: path.stat().st_mtime_ns for path in (out / folder).rglob("*")} == before
