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
from training_helpers import assert_same_tensors, save_teacher, unfolded
from transformers import (
    BertConfig,
    PreTrainedModel,
    SwinConfig,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import trainers.report.report
from hub_cards.records import EVALUATIONS
from modeling_adala import AdaLAViTForImageClassification, LinearAttentionConfig, UsageError, convert
from trainers.base_config import AdaLATrainingArguments
from trainers.data.data_config import DataConfig
from trainers.data.digits import load_digits
from trainers.runs.output_folder import OutputFolder
from trainers.runs.recipe_config import RecipeConfig
from trainers.runs.stages import STAGES
from vit_adala.arguments import LINEAR_ATTENTION
from vit_adala.cli import COMMANDS, main

# these train or evaluate on images; the others have tests of their own
ON_DATA = ["run", "align", "distill", "finetune", "evaluate"]
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
        student = convert(stock, check_parity=False)
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


# --- what fails, besides the table of test_bad_inputs.py -------------------------------------------------------------


def test_unknown_command_names_those_that_exist(refused):
    refused(2, ["train", "--teacher", "x"], ("'train'", *COMMANDS))


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
    assert "stage 1, attention alignment: " in capsys.readouterr().out
    assert_same_tensors(load_file(out / ALIGNED / "model.safetensors"), trained)
    assert AdaLAViTForImageClassification.from_pretrained(out / ALIGNED).config.adala_stage == "attention-alignment"
    assert not (out / ALIGNED / "checkpoints").exists()


def test_wrong_data_of_a_run_do_not_stand_in_the_way_of_right_ones(refused, places, out, monkeypatch):
    refused(2, arguments("run", out, places, **{"train-split": "training"}), ("split='training'",))
    ran = []
    monkeypatch.setattr(
        "trainers.runs.recipe._Run.run", lambda self: ran.append(self.config) or self.out / "report.md"
    )
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
    monkeypatch.setattr(
        trainers.report.report, "measure_speed", partial(trainers.report.report.measure_speed, budget=0.0)
    )
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
            rf"{EVALUATIONS[stage]}: 2 steps in \d+ s, at most \d+\.\d GiB of memory, 64 images,"
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
    assert after.keys() == unfolded(before)
    changed = {name for name in after if not before[name].equal(after[name])}
    assert any("q_proj" in name for name in changed)
    assert all("_proj." in name or ".fc" in name for name in changed)
    student = AdaLAViTForImageClassification.from_pretrained(out / DISTILLED)
    assert student.config.adala_stage == "feature-alignment"


def test_finetune_takes_the_softmax_teacher_as_the_baseline(places, out, capsys):
    assert main(arguments("finetune", out, places, model="@teacher")) == 0
    assert "accuracy " in capsys.readouterr().out
    model = ViTForImageClassification.from_pretrained(out / FINETUNED)
    assert (model.config.model_type, model.config.num_labels) == ("vit", 10)
    assert not hasattr(model.config, "adala_stage")


def test_finetune_learns_from_a_teacher_beside_the_labels(places, out, capsys):
    assert main(arguments("finetune", out, places, teacher="@teacher", teacher_features_weight=0.5)) == 0
    settings = json.loads((out / FINETUNED / "manifest.json").read_text())["stages"]["supervised"]["settings"]
    assert (settings["teacher_logits_weight"], settings["teacher_features_weight"]) == (1.0, 0.5)
    lines = [json.loads(line) for line in (out / FINETUNED / "metrics.jsonl").read_text().splitlines()]
    logs = [line for line in lines if "loss" in line]
    parts = ("labels", "teacher_logits", "teacher_features")
    assert logs and all(line["loss"] == pytest.approx(sum(line[x] for x in parts), rel=1e-4) for line in logs)
    capsys.readouterr()
    assert main(arguments("finetune", out, places, teacher="@student", teacher_features_weight=0.5)) == 2
    assert "teacher=" in capsys.readouterr().err


def test_weights_of_a_teacher_need_one(places, out, refused):
    refused(2, arguments("finetune", out, places, teacher_logits_weight=1), ("teacher_logits_weight=1", "--teacher"))
    assert not out.exists()


def test_same_stage_again_says_that_it_is_done(places, out, capsys):
    for command, folder in zip(("align", "distill", "finetune"), FOLDERS):
        assert main(arguments(command, out, places)) == 0
        before = {path: path.stat().st_mtime_ns for path in (out / folder).rglob("*")}
        capsys.readouterr()
        assert main(arguments(command, out, places)) == 0
        assert re.fullmatch(rf"stage \d, [a-z -]+: already done, in {out / folder}\n", capsys.readouterr().out)
        assert {path: path.stat().st_mtime_ns for path in (out / folder).rglob("*")} == before


def test_every_option_of_linear_attention_has_its_help():
    assert LINEAR_ATTENTION.keys() == {item.name for item in dataclasses.fields(LinearAttentionConfig)}
