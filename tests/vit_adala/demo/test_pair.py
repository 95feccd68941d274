"""Which two models the demo shows, and what it says where Gradio is missing."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from training_helpers import save_teacher

from modeling_adala import convert
from modeling_adala.errors import UsageError
from modeling_adala.families import is_adala
from trainers.data.digits import DIGITS_TEACHER
from vit_adala.cli import main
from vit_adala.demo import pair as pairs
from vit_adala.demo.pair import QUICKSTART, check_models, open_pair


def test_without_a_model_it_is_the_quickstarts_or_the_digits_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_models(None) == (str(DIGITS_TEACHER), None, None)
    convert(DIGITS_TEACHER, check_parity=False).save_pretrained(QUICKSTART)
    assert check_models(None) == (QUICKSTART, str(DIGITS_TEACHER), None)


def test_a_student_comes_with_the_teacher_that_it_says(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    convert(teacher, check_parity=False).save_pretrained(tmp_path / "student")
    student = str(tmp_path / "student")
    assert check_models(student) == (student, teacher, None)
    shutil.rmtree(teacher)
    with pytest.raises(UsageError, match="came from 'teacher', which is not here; pass --teacher"):
        check_models(student)


def test_a_softmax_model_is_shown_beside_itself_made_linear(monkeypatch):
    pair = open_pair(*check_models(str(DIGITS_TEACHER)))
    assert not is_adala(pair.models["teacher"].config) and is_adala(pair.models["student"].config)
    assert pair.names == {"teacher": "vit-digits", "student": "vit-digits"}
    assert "6 layers, 128 wide, patch 2" in pair.describe("teacher")
    assert pair.describe("student") == "linear attention in 6 layers · power · local mixing 3x3 · not trained"
    assert pair.processor is not None and pair.tokenizer is None
    assert not any(model.training for model in pair.models.values())


@pytest.mark.parametrize(("seconds", "largest"), [(1e-6, 256), (1e3, 32)])
def test_the_largest_image_is_one_that_the_machine_is_quick_at(seconds, largest, monkeypatch):
    monkeypatch.setattr(pairs, "_seconds", lambda model, side: seconds)
    pair = open_pair(str(DIGITS_TEACHER), None)
    assert pair.sides == (16, 28, largest)
    assert replace(pair, max_size=24).sides == (16, 24, 24)


def test_a_missing_gradio_is_one_line_with_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # which the command sets
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vit_adala.demo.app", raising=False)
    assert main(["demo", str(DIGITS_TEACHER)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "gradio is not installed" in line and "pip install" in line


def test_only_the_page_needs_gradio():
    folder = Path(pairs.__file__).parent
    assert {path.stem for path in folder.glob("*.py") if "import gradio" in path.read_text()} == {"app"}
