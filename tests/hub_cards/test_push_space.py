"""Pushing the demo of a model as a Space: what goes up runs on its own, and what else is there stays."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import WRITE_TOKEN
from huggingface_hub import HfApi, metadata_load
from training_helpers import save_teacher

from hub_cards.push import plan_push, push
from hub_cards.push_space import plan_space
from modeling_adala import convert
from modeling_adala.errors import UsageError
from vit_adala.cli import main

ROOT = Path(__file__).parents[2]
MODEL, SPACE = "org/model", "org/demo"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models")
    convert(save_teacher(folder / "teacher"), check_parity=False).save_pretrained(folder / "student")
    return str(folder / "student")


def write_files(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_a_space_is_the_app_its_front_matter_and_the_packages(hub, tmp_path):
    url = push(plan_space(SPACE, MODEL))
    assert url.startswith(f"{hub.url}/spaces/{SPACE}/commit/") and hub.repositories.keys() == {f"spaces/{SPACE}"}
    files = hub.files(f"spaces/{SPACE}")
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "*.py"], capture_output=True, text=True)
    packages = ("hub_cards/", "modeling_adala/", "trainers/", "vit_adala/")
    code = {name for name in tracked.stdout.split() if name.startswith(packages)}
    assert len(code) > 80 or tracked.returncode  # no checkout
    assert code <= files.keys() and "trainers/teachers/vit-digits/model.safetensors" in files
    assert {name.partition("/")[0] + "/" for name in files if "/" in name} == set(packages)
    assert not [name for name in files if "__pycache__" in name or name.startswith(".git/")]
    write_files({"README.md": files["README.md"]}, tmp_path)
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["sdk"] == "gradio" and metadata["app_file"] in files and metadata["license"] == "apache-2.0"
    assert metadata["title"] == "demo" and metadata["models"] == [MODEL] and metadata["python_version"] == "3.11"
    assert len(metadata["short_description"]) <= 60  # the Hub refuses longer ones


def test_pushing_again_changes_what_is_ours_and_nothing_else(hub):
    push(plan_space(SPACE, MODEL))
    assert plan_space(SPACE, MODEL).changes == []
    api = HfApi(endpoint=hub.url, token=WRITE_TOKEN)
    for name in ("trainers/renamed.py", "notes.md"):
        api.upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id=SPACE, repo_type="space")
    plan = plan_space(SPACE, "org/other")
    assert {file.path: file.change for file in plan.changes} == {
        "README.md": "changed",
        "trainers/renamed.py": "deleted",
    }
    push(plan)
    assert hub.files(f"spaces/{SPACE}")["notes.md"] == b"old"
    with pytest.raises(UsageError, match="org/demo is public"):
        plan_space(SPACE, MODEL, private=True)


RUN = """
import runpy, sys
from unittest.mock import MagicMock
sys.modules["gradio"] = MagicMock()
import vit_adala.demo.app as app
app.serve = lambda *names: print(*names, vit_adala.__file__, app.STYLE.is_file())
import vit_adala
from vit_adala.demo.pair import DIGITS_TEACHER, check_models
print(check_models(str(DIGITS_TEACHER)))
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.mark.long
def test_what_goes_up_runs_where_nothing_of_this_package_is_installed(hub, tmp_path):
    push(plan_space(SPACE, MODEL))
    write_files(hub.files(f"spaces/{SPACE}"), tmp_path)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    teacher, shown = done.stdout.splitlines()[-2:]
    assert str(tmp_path) in teacher
    assert shown == f"{MODEL} {tmp_path / 'vit_adala' / '__init__.py'} True"


def test_the_command_pushes_model_and_space(hub, student, capsys):
    assert main(["push", student, MODEL, "--space", SPACE, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"vit_adala/ \(\d+ files\)", printed) and "sdk: gradio" in printed and hub.repositories == {}
    assert main(["push", student, MODEL, "--space", SPACE, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["repo_id"] == MODEL and result["space"]["repo_id"] == SPACE
    assert f"/spaces/{SPACE}/commit/" in result["space"]["url"] and "/spaces/" not in result["url"]
    assert hub.repositories.keys() == {MODEL, f"spaces/{SPACE}"}
    assert main(["push", student, MODEL, "--space", SPACE]) == 0
    assert capsys.readouterr().out.count("nothing has changed") == 2


def test_nothing_goes_up_if_either_needs_consent(hub, student, capsys):
    push(plan_space(SPACE, "org/before"))
    assert main(["push", student, MODEL, "--space", SPACE]) == 2
    assert f"{SPACE} exists and would change" in capsys.readouterr().err
    assert MODEL not in hub.repositories
    hub.fail(f"POST /api/spaces/{SPACE}/commit/", 500, times=20)
    assert main(["push", student, MODEL, "--space", SPACE, "--yes"]) == 1
    assert "status 500" in capsys.readouterr().err.splitlines()[-1]
    assert MODEL in hub.repositories and plan_push(student, MODEL).changes == []
