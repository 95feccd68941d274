"""What the README shows works as it stands."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoImageProcessor

from modeling_adala import convert
from trainers.digits import DIGITS_TEACHER
from vit_adala.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMAND_LINES = sorted(set(re.findall(r"^vit-adala .*$|(?<=`)vit-adala [^`]+", README, flags=re.MULTILINE)))


def test_using_the_model_of_the_quickstart(tmp_path, monkeypatch, capsys):
    """With an untrained student in the place of the quickstart's."""
    saved = tmp_path / "out" / "quickstart" / "3-supervised"
    convert(DIGITS_TEACHER)[0].save_pretrained(saved)
    AutoImageProcessor.from_pretrained(DIGITS_TEACHER).save_pretrained(saved)
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[0], "README.md", "exec"), {})
    assert re.search(r"tensor\(\[\d, \d, \d, \d\]\)", capsys.readouterr().out)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_and_options_exist(line, capsys):
    _, command, *arguments = shlex.split(re.sub(r"\[.*?\]|\.\.\.", "", line))
    if command.startswith("--"):
        return
    assert command in COMMANDS
    with pytest.raises(SystemExit):
        main([command, "--help-all"])
    known = capsys.readouterr().out
    assert all(option in known for option in arguments if option.startswith("--"))
