"""What was pushed opens by its Hub id in fresh processes: with the package, without it, and offline from the cache.

Processes are slow to start, so each does many things and writes down what it saw; the tests read that.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from packaging.requirements import Requirement
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessorPil, pipeline

from modeling_adala import (
    AdaLADinov2Backbone,
    AdaLADinov2Config,
    AdaLADinov2ForImageClassification,
    AdaLADinov2Model,
    AdaLAViTForImageClassification,
    AdaLAViTModel,
    convert,
)
from trainers.data.digits import DIGITS_TEACHER

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).parents[2]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
LABELS = ["cat", "dog", "bird"]
TINY |= {"image_size": 28, "patch_size": 7, "id2label": dict(enumerate(LABELS)), "initializer_range": 0.3}
# repository and revision, Auto class -> what the folder that was pushed gives in the class that has to come out
OPENED = [
    ("org/digits", None, "AutoModelForImageClassification", AdaLAViTForImageClassification, "digits"),
    ("org/digits", None, "AutoModel", AdaLAViTModel, "digits"),
    ("org/digits", "v1", "AutoModelForImageClassification", AdaLAViTForImageClassification, "digits"),
    ("org/digits", "next", "AutoModelForImageClassification", AdaLAViTForImageClassification, "retrained"),
    ("org/dinov2", None, "AutoModelForImageClassification", AdaLADinov2ForImageClassification, "dinov2"),
    ("org/dinov2", None, "AutoModel", AdaLADinov2Model, "dinov2"),
    ("org/dinov2", None, "AutoBackbone", AdaLADinov2Backbone, "dinov2"),
]

# --- processes -------------------------------------------------------------------------------------------------------

PRELUDE = """
import json, os, sys
from pathlib import Path
settings = json.loads(sys.argv[1])
sys.path[:0] = settings["path"]
import torch
torch.set_num_threads(settings["threads"])  # the order of additions depends on it
import transformers

folder, seen = Path(settings["folder"]), {}

def outputs(model, inputs):
    with torch.no_grad():
        values = model.eval()(inputs).to_tuple()
    return [x for value in values for x in (value if isinstance(value, tuple) else (value,))]

def open_all(**kwargs):
    inputs = torch.load(folder / "inputs.pt")
    for repo_id, revision, auto_class in settings["open"]:
        revisions = {} if revision is None else {"revision": revision}
        model = getattr(transformers, auto_class).from_pretrained(repo_id, **revisions, **kwargs)
        name = f"{repo_id} {revision} {auto_class}"
        seen[name] = {"class": type(model).__name__, "outputs": outputs(model, inputs[repo_id])}

def open_pipelines(**kwargs):
    from PIL import Image
    from transformers import AutoImageProcessor, pipeline
    image = Image.open(folder / "image.png")
    seen["processed"] = AutoImageProcessor.from_pretrained("org/dinov2")(image, return_tensors="pt").pixel_values
    seen["pipeline"] = pipeline("image-classification", model="org/dinov2", **kwargs)(image)
    seen["pipeline without task"] = pipeline(model="org/dinov2", **kwargs)(image)
    features = pipeline("image-feature-extraction", model="org/dinov2", **kwargs)(image)
    seen["features"] = torch.tensor(features)

def remote_modules():
    return sorted(name for name in sys.modules if name.startswith("transformers_modules."))
"""

WITH_PACKAGE = """
import modeling_adala
from huggingface_hub import HfApi
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments
from vit_adala.cli import main

digits, retrained, dinov2 = (str(folder / name) for name in ("digits", "retrained", "dinov2"))
assert main(["push", digits, "org/digits"]) == 0
HfApi().create_tag("org/digits", tag="v1")
assert main(["push", retrained, "org/digits", "--revision", "next", "--yes"]) == 0
assert main(["push", dinov2, "org/dinov2"]) == 0
AutoModelForImageClassification.from_pretrained(dinov2).push_to_hub("org/method")
AutoImageProcessor.from_pretrained(dinov2).push_to_hub("org/method")
open_all()
open_pipelines()

model = AutoModelForImageClassification.from_pretrained(dinov2)
data = [{"pixel_values": torch.randn(3, 28, 28), "labels": i % 3} for i in range(4)]
args = TrainingArguments(str(folder / "trained"), max_steps=1, save_strategy="no", push_to_hub=True, use_cpu=True,
    hub_model_id="org/trained", report_to="none", disable_tqdm=True)
trainer = Trainer(model, args, train_dataset=data, processing_class=AutoImageProcessor.from_pretrained(dinov2))
trainer.train()
trainer.push_to_hub()
model.save_pretrained(folder / "saved with", push_to_hub=True, repo_id="org/saved")
seen["remote modules"] = remote_modules()
"""

WITHOUT_PACKAGE = """
import builtins, importlib.util
assert not any(importlib.util.find_spec(name) for name in ("modeling_adala", "trainers", "hub_cards", "vit_adala"))
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

for repo_id in ("org/digits", str(folder / "digits")):
    try:
        AutoModel.from_pretrained(repo_id)
    except ValueError as error:
        seen[f"{repo_id} neither"] = str(error)
sha = settings["sha"]
pinned = {"trust_remote_code": True, "code_revision": sha}
config = AutoConfig.from_pretrained("org/digits", **pinned)
seen["config module"] = type(config).__module__
open_all(trust_remote_code=True)
open_pipelines(trust_remote_code=True)

# a script of somebody else: nothing but --trust_remote_code tells it about us
from transformers import AutoImageProcessor, Trainer, TrainingArguments
config = AutoConfig.from_pretrained("org/digits", num_labels=3, finetuning_task="image-classification",
    trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("org/digits", trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained("org/digits", config=config, trust_remote_code=True,
    ignore_mismatched_sizes=True)
size = (model.config.num_channels, model.config.image_size, model.config.image_size)
data = [{"pixel_values": torch.randn(size), "labels": i % 3} for i in range(4)]
args = TrainingArguments(str(folder / "finetuned"), max_steps=2, save_steps=1, push_to_hub=True, use_cpu=True,
    hub_model_id="org/finetuned", report_to="none", disable_tqdm=True)
trainer = Trainer(model, args, train_dataset=data, processing_class=processor)
trainer.train()
trainer.push_to_hub()
seen["checkpoint"] = sorted(os.listdir(folder / "finetuned" / "checkpoint-1"))
resumed = Trainer(model, args, train_dataset=data, processing_class=processor)
resumed.train(resume_from_checkpoint=str(folder / "finetuned" / "checkpoint-1"))

model = AutoModelForImageClassification.from_pretrained("org/dinov2", trust_remote_code=True)
model.save_pretrained(folder / "saved without")
model.push_to_hub("org/pushed-without")
inputs = torch.load(folder / "inputs.pt")["org/dinov2"]
seen["expected again"] = outputs(model, inputs)
for name, place in {"local": str(folder / "saved without"), "hub": "org/pushed-without"}.items():
    again = AutoModelForImageClassification.from_pretrained(place, trust_remote_code=True)
    seen[f"again {name}"] = outputs(again, inputs)
seen["remote modules"] = remote_modules()
"""

TORCH_AND_TRANSFORMERS = """
import importlib.metadata
seen["installed"] = sorted(found.name for found in importlib.metadata.distributions())
open_all(trust_remote_code=True)
"""


def installed(*names: str) -> dict[str, importlib.metadata.Distribution]:
    """These distributions and all that they require, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            needs = map(Requirement, found[name].requires or [])
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def site_packages(folder: Path, *names: str) -> Path:
    """A folder that holds what `pip install NAMES` would, as links."""
    folder.mkdir()
    for distribution in installed(*names).values():
        for part in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / part).exists():
                (folder / part).symlink_to(str(distribution.locate_file(part)))
    return folder


def run(script: str, hub: HubServer, folder: Path, home: str, site: Path | None = None, **settings) -> dict:
    """What the script saw, in a process that has this repository on its path, or nothing but `site`."""
    path = [str(REPOSITORY)] if site is None else [str(site)]
    settings |= {"folder": str(folder), "path": path, "threads": torch.get_num_threads()}
    settings |= {"open": [row[:3] for row in OPENED]} | settings
    child = subprocess.run(
        [
            sys.executable,
            *([] if site is None else ["-I", "-S"]),
            "-c",
            f"{PRELUDE}{script}{END}",
            json.dumps(settings),
        ],
        cwd=folder,
        env=hub.environment(folder / home) | settings.get("environment", {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return torch.load(folder / "seen.pt") | {"stderr": child.stderr}


END = """
torch.save(seen, folder / "seen.pt")
"""

# --- what they are to find -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three checkpoints, an image and inputs: what the quickstart starts with, the same retrained, and a DINOv2."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pull")
    digits = convert(DIGITS_TEACHER)
    digits.save_pretrained(folder / "digits")
    with torch.no_grad():
        for parameter in digits.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    digits.save_pretrained(folder / "retrained")
    AdaLADinov2ForImageClassification(AdaLADinov2Config(**TINY)).save_pretrained(folder / "dinov2")
    for name in ("digits", "retrained"):
        AutoImageProcessor.from_pretrained(DIGITS_TEACHER).save_pretrained(folder / name)
    size = {"height": 28, "width": 28}
    BitImageProcessorPil(size=size, crop_size=size).save_pretrained(folder / "dinov2")
    config = digits.config
    inputs = torch.randn(2, config.num_channels, config.image_size, config.image_size)
    torch.save({"org/digits": inputs, "org/dinov2": torch.randn(2, 3, 28, 28)}, folder / "inputs.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def with_package(hub, folder) -> dict:
    return run(WITH_PACKAGE, hub, folder, "home with package")


@pytest.fixture(scope="module")
def without_package(hub, folder, with_package) -> dict:
    hub.lfs_suffixes = ()
    site = site_packages(folder / "site", "torch", "transformers", "pillow", "accelerate")
    return run(WITHOUT_PACKAGE, hub, folder, "home", site, sha=hub.head("org/digits"))


@pytest.fixture(scope="module")
def bare(hub, folder, without_package) -> dict:
    site = site_packages(folder / "bare site", "torch", "transformers")
    return run(TORCH_AND_TRANSFORMERS, hub, folder, "another home", site)


@pytest.fixture(scope="module")
def offline(hub, folder, bare) -> dict:
    hub.requests.clear()
    opened = [row[:3] for row in OPENED if row[2] != "AutoBackbone"]  # asks the Hub whether the repository exists
    site = folder / "bare site"
    environment = {"HF_HUB_OFFLINE": "1"}
    return run(TORCH_AND_TRANSFORMERS, hub, folder, "another home", site, open=opened, environment=environment)


def check_opened(seen: dict, folder: Path, skip: str | None = None) -> None:
    inputs = torch.load(folder / "inputs.pt")
    for repo_id, revision, auto_class, expected_class, name in OPENED:
        if auto_class == skip:
            continue
        found = seen[f"{repo_id} {revision} {auto_class}"]
        assert found["class"] == expected_class.__name__
        model = expected_class.from_pretrained(folder / name).eval()
        with torch.no_grad():
            values = model(inputs[repo_id]).to_tuple()
        expected = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
        assert len(found["outputs"]) == len(expected)
        fresh = expected_class is AdaLAViTModel  # a classifier has no pooler, so that of the bare model is random
        for actual, value in list(zip(found["outputs"], expected))[: 1 if fresh else None]:
            torch.testing.assert_close(actual, value, rtol=0, atol=0)


def check_pipelines(seen: dict, folder: Path) -> None:
    image = Image.open(folder / "image.png")
    processed = AutoImageProcessor.from_pretrained(folder / "dinov2")(image, return_tensors="pt").pixel_values
    assert torch.equal(seen["processed"], processed)
    classify = pipeline("image-classification", model=str(folder / "dinov2"))
    assert seen["pipeline"] == classify(image)
    assert seen["pipeline without task"] == seen["pipeline"]
    assert {answer["label"] for answer in seen["pipeline"]} == set(LABELS)
    extract = pipeline("image-feature-extraction", model=str(folder / "dinov2"))
    assert torch.equal(seen["features"], torch.tensor(extract(image)))


def test_with_the_package_no_remote_code_runs(with_package, folder):
    check_opened(with_package, folder)
    check_pipelines(with_package, folder)
    assert with_package["remote modules"] == []


def test_without_the_package_the_code_comes_from_the_repository(without_package, folder):
    check_opened(without_package, folder)
    check_pipelines(without_package, folder)
    assert without_package["remote modules"]


def test_the_code_is_pinned_by_its_revision(without_package, hub):
    assert hub.repositories["org/digits"].branches["main"] in without_package["config module"]


def test_without_package_and_without_trust_the_message_names_the_way_out(without_package, folder):
    for place in ("org/digits", str(folder / "digits")):
        message = without_package[f"{place} neither"]
        assert place in message
        assert "trust_remote_code=True" in message


def test_torch_and_transformers_are_enough(bare, folder):
    check_opened(bare, folder)
    assert {"torch", "transformers"} <= set(bare["installed"])
    assert not {"pillow", "accelerate", "datasets", "vit-adala"} & set(bare["installed"])


def test_offline_from_the_cache(offline, hub, folder):
    check_opened(offline, folder, skip="AutoBackbone")
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["org/digits", "org/dinov2", "org/method", "org/trained", "org/saved"])
def test_repositories_pushed_with_the_package_are_complete(repo_id, with_package, hub, folder):
    check_complete(hub.files(repo_id), folder)


@pytest.mark.parametrize("repo_id", ["org/finetuned", "org/pushed-without"])
def test_repositories_pushed_without_the_package_are_complete(repo_id, without_package, hub, folder):
    check_complete(hub.files(repo_id), folder)


def check_complete(files: dict[str, bytes], folder: Path) -> None:
    """Weights, configuration and every file that its `auto_map` names, with those that they import."""
    config = json.loads(files["config.json"])
    assert "model.safetensors" in files
    names = {f"{reference.split('.')[0]}.py" for reference in config["auto_map"].values()}
    for name in names | {path.name for path in (folder / "digits").glob("*.py")}:
        assert files[name] == (REPOSITORY / "modeling_adala" / name).read_bytes()
        for imported in re.findall(r"^from \.(\w+) import", files[name].decode(), flags=re.MULTILINE):
            assert f"{imported}.py" in files
    assert {"AutoConfig", "AutoModel", "AutoModelForImageClassification"} <= set(config["auto_map"])


def test_a_model_loaded_without_the_package_saves_and_pushes_again(without_package, folder):
    for name in ("local", "hub"):
        for actual, expected in zip(without_package[f"again {name}"], without_package["expected again"]):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    files = {path.name: path.read_bytes() for path in (folder / "saved without").iterdir()}
    check_complete(files, folder)


def test_checkpoints_of_a_strange_script_are_complete(without_package, folder):
    assert {path.name for path in (folder / "digits").glob("*.py")} <= set(without_package["checkpoint"])
