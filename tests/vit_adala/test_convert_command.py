"""`vit-adala convert`, the options of linear attention in all commands, and how often a teacher is opened."""

import json
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from family_helpers import stock_config_class, tiny_config
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from training_helpers import save_teacher
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from hub_cards.card import build_card
from modeling_adala import convert
from modeling_adala.configuration_adala import LinearAttentionConfig, vision_config
from modeling_adala.conversion import loading
from modeling_adala.conversion.loading import load_student
from modeling_adala.modeling_adala import MODELS
from vit_adala.cli import main

QUICK = ["--max-steps", "1", "--per-device-train-batch-size", "8", "--use-cpu", "--bf16", "false"]
DATA = ["--dataset", "mnist-digits", "--train-split", "train[:16]"]
LINEAR = ["--feature-map", "elu", "--feature-map-kwargs", "{scale: 0.5}", "--softmax-layers", "-1"]


@pytest.fixture
def teacher(tmp_path) -> str:
    folder = save_teacher(tmp_path / "teacher")
    Path(folder, "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    return folder


def test_student_is_that_of_convert_with_its_processor_and_card(teacher, tmp_path, capsys):
    out = tmp_path / "student"
    assert main(["convert", teacher, "--output-dir", str(out), *LINEAR]) == 0
    said = capsys.readouterr().out
    assert str(out) in said and f"vit-adala distill {out} --teacher {teacher} --dataset" in said
    expected = convert(teacher, feature_map="elu", feature_map_kwargs={"scale": 0.5}, softmax_layers=[-1])
    student = load_student(str(out))
    assert type(student) is type(expected) and student.config.adala_stage == "converted"
    assert (student.config.feature_map, student.config.feature_map_kwargs) == ("elu", {"scale": 0.5})
    assert student.config.softmax_layers == expected.config.softmax_layers == [1]
    found = student.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(tensor.equal(found[name]) for name, tensor in expected.state_dict().items())
    assert AutoImageProcessor.from_pretrained(out).size == AutoImageProcessor.from_pretrained(teacher).size
    assert metadata_load(out / "README.md")["license"] == "mit"
    assert "not trained" in build_card(out).text


def test_second_call_changes_nothing_and_other_options_are_refused(teacher, tmp_path, capsys):
    out = tmp_path / "student"
    command = ["convert", teacher, "--output-dir", str(out)]
    assert main(command) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert main(command) == 0
    assert "already done" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert main([*command, "--feature-map", "elu"]) == 2
    assert "feature_map='power', not 'elu'" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert main(command) == 2
    assert "'notes.txt'" in capsys.readouterr().err


def test_converted_student_is_distilled(teacher, tmp_path):
    out, distilled = str(tmp_path / "student"), str(tmp_path / "distilled")
    assert main(["convert", teacher, "--output-dir", out, "--feature-map", "elu"]) == 0
    assert main(["distill", out, "--teacher", teacher, "--output-dir", distilled, *DATA, *QUICK]) == 0
    student = load_student(distilled)
    assert (student.config.adala_stage, student.config.feature_map) == ("feature-alignment", "elu")
    license = json.loads(Path(distilled, "manifest.json").read_text())["teacher_license"]
    assert license == {"license": "mit"}


@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_converted(family, tmp_path):
    config = tiny_config(stock_config_class(MODELS[family]))
    AutoModel.from_config(config).save_pretrained(tmp_path / "teacher")
    shutil.copy(Path(save_teacher(tmp_path / "vit")) / "preprocessor_config.json", tmp_path / "teacher")
    out = tmp_path / "student"
    assert main(["convert", str(tmp_path / "teacher"), "--output-dir", str(out), "--feature-map", "relu"]) == 0
    assert vision_config(load_student(str(out)).config).feature_map == "relu"
    assert load_file(out / "model.safetensors")


@pytest.mark.parametrize("command", ["convert", "align", "distill", "run"])
def test_every_command_that_converts_takes_the_options_of_linear_attention(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    group = text.partition("linear attention (LinearAttentionConfig):")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in group.splitlines() if line.strip().startswith("--")] == [
        f"--{item.name.replace('_', '-')}" for item in fields(LinearAttentionConfig)
    ]


@pytest.mark.parametrize("command", ["align", "distill"])
def test_a_stage_converts_with_the_options_of_linear_attention(command, teacher, tmp_path):
    out = str(tmp_path / "out")
    assert main([command, teacher, "--output-dir", out, *DATA, *QUICK, *LINEAR]) == 0
    config = load_student(out).config
    assert (config.feature_map, config.feature_map_kwargs, config.softmax_layers) == ("elu", {"scale": 0.5}, [1])


def test_align_opens_its_teacher_once(teacher, tmp_path, monkeypatch):
    counts: Counter = Counter()

    def counted(owner, name, label):
        original = getattr(owner, name)
        function = getattr(original, "__func__", original)

        def call(*args, **kwargs):
            counts[label] += str(next((value for value in args if isinstance(value, str)), "")) == teacher
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, classmethod(call) if function is not original else call)

    counted(AutoConfig, "from_pretrained", "config")
    counted(loading, "check_checkpoint", "folder")
    counted(PreTrainedModel, "from_pretrained", "weights")
    assert main(["align", teacher, "--output-dir", str(tmp_path / "out"), *DATA, *QUICK]) == 0
    assert counts == {"config": 1, "folder": 1, "weights": 1}
