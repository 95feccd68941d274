"""What the README shows works as it stands."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from training_helpers import tiny_dinov2
from transformers import AutoImageProcessor

from modeling_adala import convert
from trainers import AttentionAlignmentConfig, FeatureAlignmentConfig
from trainers.data.digits import DIGITS_TEACHER
from vit_adala.arguments import CommandParser
from vit_adala.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])
LINES = re.findall(r"^vit-adala .*$|(?<=`)vit-adala [^`]+", PAGES.replace("\\\n", " "), flags=re.MULTILINE)
READ = CommandParser.read
COMMAND_LINES = sorted({line for line in LINES if re.match(r"vit-adala \w", line)})


def test_using_the_model_of_the_quickstart(tmp_path, monkeypatch, capsys):
    """With an untrained student in the place of the quickstart's."""
    saved = tmp_path / "out" / "quickstart" / "3-supervised"
    convert(DIGITS_TEACHER).save_pretrained(saved)
    AutoImageProcessor.from_pretrained(DIGITS_TEACHER).save_pretrained(saved)
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in PYTHON if "load_digits" in block]
    exec(compile(block, "README.md", "exec"), {})
    assert re.search(r"tensor\(\[\d, \d, \d, \d\]\)", capsys.readouterr().out)


def test_blocks_that_convert_and_train_run(tmp_path, monkeypatch):
    """With a tiny teacher in the place of the one on the Hub, and one step of each stage."""
    tiny_dinov2().save_pretrained(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    for name, config in (("Attention", AttentionAlignmentConfig), ("Feature", FeatureAlignmentConfig)):
        step = partial(config, max_steps=1, use_cpu=True, report_to="none")
        monkeypatch.setattr(f"trainers.{name.lower()}_alignment_trainer.{name}AlignmentConfig", step)
    images = [{"pixel_values": pixels} for pixels in torch.randn(4, 1, 28, 28)]
    blocks = [block for block in PYTHON if "facebook/dinov2-small" in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("facebook/dinov2-small", "teacher"), "README.md", "exec"), {"images": images})
    assert (tmp_path / "dinov2-small-linear" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_of_the_docs_is_in_the_index_and_in_the_navigation():
    index, navigation = (ROOT / "docs" / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in navigation and (page.name == "index.md" or f"({page.name})" in index)


def test_configurations_for_accelerate_are_ones_that_it_takes(tmp_path):
    files = re.findall(r"```yaml\n(compute_environment.*?)```", PAGES, flags=re.DOTALL)
    assert len(files) == 2
    for text in files:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        found = load_config_from_file(str(path))
        assert found.to_dict().items() >= yaml.safe_load(text).items()


class Parsed(Exception):
    """Raised in the place of what a command would do."""


@pytest.fixture
def parsed(monkeypatch):
    """Runs a command line as far as its arguments are read; the options that it was given."""

    def read_and_stop(parser, arguments):
        raise Parsed(READ(parser, arguments))

    monkeypatch.setattr(CommandParser, "read", read_and_stop)

    def run(line: str) -> dict:
        with pytest.raises(Parsed) as stopped:
            main([*shlex.split(line)[1:], "--debug"])
        return stopped.value.args[0]

    return run


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_of_the_pages_are_understood(parsed, line):
    command, *rest = line.split()[1:]
    if rest:  # not where a command is merely named
        given = parsed(re.sub(r"\[(.*?)\]|\.\.\.", r"\1", line).replace("$D", "--dataset data"))
        assert given and command in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_example_in_the_help_of_a_command_is_understood(parsed, capsys, monkeypatch, command):
    with monkeypatch.context() as patch:
        patch.setattr(CommandParser, "read", READ)
        with pytest.raises(SystemExit):
            main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    example = text.partition("example: ")[2]
    assert example.startswith(f"vit-adala {command} ") and parsed(example)
