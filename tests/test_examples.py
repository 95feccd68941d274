"""Every example runs with --smoke as a user would run it, without a network, and what it says is true.

Each is a process of its own, forked from one that has imported the libraries and nothing of ours: ten examples would
import them ten times. They share what they leave behind.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

from modeling_adala import AdaLAViTForImageClassification, AdaLAViTForSemanticSegmentation
from trainers.data.digits import load_digits

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
DEAD_END = "http://127.0.0.1:9"
SHARE, CHANGE = r"\d+\.\d%", r"\d+\.\d% -> \d+\.\d%"
LAST_LINES = {
    "custom_dataset": rf"out/bits: zero or one, accuracy {CHANGE} on 200 images, 0 skipped as unreadable",
    "finetune_classifier": rf"out/classifier: accuracy {CHANGE} on 100 held-out images",
    "finetune_lora": (
        rf"out/lora: [\d,]+ of [\d,]+ parameters trained, 0\.\d\d MB; accuracy {CHANGE} on 100 held-out digits;"
        r" logits of the reloaded model differ by 0"
    ),
    "linearize": (
        r"out/linearize: cosine of the patches to the teacher's (\d\.\d{3}) -> (\d\.\d{3}) -> (\d\.\d{3})"
        rf" \(converted, stage 1, stage 2\); k-NN {SHARE}, teacher {SHARE}; 40 held-out images"
    ),
    "segment": (rf"out/segment: mean IoU {CHANGE}, pixel accuracy {CHANGE} on 100 images, 0 skipped as unreadable"),
    "share": (
        r"http://127\.0\.0\.1:\d+/org/vit-adala-digits/commit/[0-9a-f]{40}: \d+ files, \d\.\d MB;"
        r" AdaLAViTForImageClassification opened as org/vit-adala-digits, its logits differ from the folder's by 0"
    ),
}

LONG = {"custom_dataset", "finetune_lora", "segment", "share"}


@dataclass(frozen=True)
class Run:
    """What an example printed, where it ran, and the CPU seconds that it took."""

    output: str
    folder: Path
    seconds: float

    @property
    def last_line(self) -> str:
        return self.output.rstrip().splitlines()[-1]


Runs = Callable[..., Run]
# stderr goes nowhere: progress bars and warnings of the libraries
SERVER = """
import json, os, runpy, sys, traceback
import accelerate, datasets, evaluate, peft, safetensors.torch, torch, transformers
from transformers import AutoImageProcessor, AutoModel, Trainer, ViTForImageClassification

for line in sys.stdin:
    log, script, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            code = 1
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
    _, status, usage = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]), flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    """`runs(name, *arguments)` runs `python examples/NAME.py`, once, all in one folder, without network or cache."""
    folder = tmp_path_factory.mktemp("examples")
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HOME": str(folder / "huggingface"),
        "HTTP_PROXY": DEAD_END,
        "HTTPS_PROXY": DEAD_END,
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=folder, env=environment, **pipes)

    @cache
    def run(name: str, *arguments: str) -> Run:
        log = folder / f"{name}.log"
        job = [str(log), str(REPOSITORY / "examples" / f"{name}.py"), *arguments]
        server.stdin.write(json.dumps(job).encode() + b"\n")
        server.stdin.flush()
        status, seconds = json.loads(server.stdout.readline())
        output = log.read_text()
        assert status == 0, output
        return Run(output, folder, seconds)

    with server:
        yield run


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_an_example_imports_from_the_packages_and_not_from_their_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
            ("modeling_adala", "trainers", "hub_cards")
        ):
            package = importlib.import_module(str(node.module))
            assert "." not in str(node.module)
            assert {alias.name for alias in node.names} <= set(package.__all__)


def test_every_example_is_covered():
    assert {path.stem for path in EXAMPLES} == {*LAST_LINES, "reload"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_starts_with_its_own_command(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    commands = re.findall(r"^    (python .*)$", docstring, flags=re.MULTILINE)
    assert all(command.startswith(f"python examples/{path.name} ") for command in commands)
    assert docstring.splitlines().index(f"    {commands[0]}") <= 3
    assert path.stem == "reload" or f"python examples/{path.name} --smoke" in commands


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.long] * (x in LONG)) for x in LAST_LINES])
def test_an_example_runs_in_under_three_minutes_on_one_core(name, runs):
    run = runs(name, "--smoke")
    assert re.fullmatch(LAST_LINES[name], run.last_line), run.output
    assert run.seconds < 180


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linearize", pytest.param("segment", marks=pytest.mark.long)])
def test_the_trainers_leave_a_card(name, runs):
    out = runs(name, "--smoke").folder / "out"
    (card,) = [path for path in out.glob("*/README.md") if path.parent.name in LAST_LINES[name]]
    assert "linear-attention" in ModelCard.load(card).data.tags


@pytest.mark.slow
def test_linearize_brings_the_student_closer_to_its_teacher(runs):
    run = runs("linearize", "--smoke")
    converted, stage_1, stage_2 = map(float, re.fullmatch(LAST_LINES["linearize"], run.last_line).groups())
    assert converted < stage_1 < stage_2
    out = run.folder / "out" / "linearize"
    assert json.loads((out / "evaluation.json").read_text())["patches_cosine"] == pytest.approx(stage_2, abs=5e-4)
    model = AutoModelForImageClassification.from_pretrained(out)
    assert type(model) is AdaLAViTForImageClassification
    assert model.config.linear_layers == list(range(6))


@pytest.mark.slow
def test_the_fine_tuned_classifier_is_as_good_as_it_says(runs):
    run = runs("finetune_classifier", "--smoke")
    out = run.folder / "out" / "classifier"
    model, processor = AutoModelForImageClassification.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    assert type(model) is AdaLAViTForImageClassification
    rows = load_digits("test").shuffle(seed=0).select(range(100))
    with torch.inference_mode():
        predicted = model.eval()(**processor(rows["image"][:], return_tensors="pt")).logits.argmax(-1)
    accuracy = (predicted == torch.tensor(rows["label"][:])).float().mean().item()
    assert f"-> {accuracy:.1%} on" in run.last_line


@pytest.mark.slow
def test_a_checkpoint_of_one_example_opens_in_another(runs):
    runs("finetune_classifier", "--smoke")
    run = runs("reload", "out/classifier")
    assert re.fullmatch(r"AdaLAViTForImageClassification from out/classifier: \d+ of 10 correct", run.last_line)


@pytest.mark.long
@pytest.mark.slow
def test_lora_saves_adapters_and_head_alone(runs):
    out = runs("finetune_lora", "--smoke").folder / "out" / "lora"
    assert {path.name for path in out.glob("*.safetensors")} == {"adapter_model.safetensors"}
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    adapters = {name for name in names if ".lora_A." in name or ".lora_B." in name}
    assert len(adapters) == 6 * 2 * 2  # layers, projections, A and B
    assert all(".classifier." in name for name in names - adapters)


@pytest.mark.long
@pytest.mark.slow
def test_the_segmentation_model_opens_and_is_better_than_before(runs):
    run = runs("segment", "--smoke")
    model = AutoModelForSemanticSegmentation.from_pretrained(run.folder / "out" / "segment")
    assert type(model) is AdaLAViTForSemanticSegmentation
    assert [model.config.id2label[index] for index in (0, 1, 10)] == ["background", "digit 0", "digit 9"]
    before, after = map(float, re.search(r"mean IoU (\S+)% -> (\S+)%", run.last_line).groups())
    assert before < after


@pytest.mark.long
@pytest.mark.slow
def test_share_pushes_all_that_it_takes_to_open_the_model(runs):
    listed = re.findall(r"^new +[\d,]+ bytes  (\S+)$", runs("share", "--smoke").output, flags=re.MULTILINE)
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "modeling_adala.py"} <= {
        *listed
    }


@pytest.mark.long
@pytest.mark.slow
def test_the_model_of_ones_own_data_has_its_classes(runs):
    run = runs("custom_dataset", "--smoke")
    out = run.folder / "out" / "bits"
    assert "linear-attention" in ModelCard.load(out / "README.md").data.tags
    model = AutoModelForImageClassification.from_pretrained(out)
    assert type(model) is AdaLAViTForImageClassification
    assert model.config.id2label == {0: "zero", 1: "one"}
    before, after = map(float, re.search(r"accuracy (\S+)% -> (\S+)%", run.last_line).groups())
    assert before < after


def test_the_notebook_runs_and_was_saved_with_its_pictures(tmp_path, monkeypatch):
    """One step of each stage in the place of a hundred, and a few images."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((REPOSITORY / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    for long, short in {
        '"max_steps": 100, "per_device_train_batch_size": 32': '"max_steps": 1, "per_device_train_batch_size": 4',
        "data.loader(data.eval_dataset())": "data.loader(data.eval_dataset(20))",
        "logging_steps=20": "logging_steps=20, calibration_images=4",
    }.items():
        assert long in source
        source = source.replace(long, short)
    names: dict = {}
    exec(compile(source, "quickstart.ipynb", "exec"), names)
    assert list(names["figures"]) == ["teacher", "converted", "stage 1", "stages 1+2"]
    assert type(names["again"]) is AdaLAViTForImageClassification and len(names["ranking"]) == 6 + 1
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    saved = re.findall(r"(\d+\.\d)%", "".join(text for output in outputs for text in output.get("text", [])))
    teacher, converted, _, final = map(float, saved[-5:-1])
    assert converted < 20 and abs(teacher - final) < 2
