"""Every public entry point has a runnable example, and runs it."""

import re
from types import ModuleType

import evaluate
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

import hub_cards
import modeling_adala
import trainers
from modeling_adala import convert, load_image_processor
from modeling_adala.modeling_adala import MODELS

PACKAGES = (modeling_adala, trainers, hub_cards)
# errors, results and constants; classes of a family are those of its stock class; the rest is shown by another entry
NO_EXAMPLE = {
    *("DIGITS_TEACHER", "FEATURE_MAPS", "MODELS", "AdaLAError", "CheckpointError", "DataError"),
    *("LinearReport", "ParityReport", "UsageError", "AdaLACardData", "PushPlan"),
    *(cls.__name__ for family in MODELS.values() for cls in family.values()),
    *(family["Model"].config_class.__name__ for family in MODELS.values()),
    *(
        "SegmentationData",
        "SegmentationDataset",
        "SegmentationTransform",
        "evaluate_segmentation",
        "DenseProbe",
    ),  # examples/segment.py
    *("ImageTransform", "StreamingImageDataset"),  # ImageDataset
    "feature_alignment_loss",  # attention_alignment_loss
    "keep_softmax",  # rank_softmax_layers
    *("attention_weights", "linear_attention_reference"),  # linear_attention, which takes the same
    *("plan_push", "push"),  # examples/share.py, which needs a Hub
    "run_recipe",  # RecipeConfig, and make quickstart
}


def entry_points(package: ModuleType) -> list[str]:
    return [name for name in package.__all__ if name not in NO_EXAMPLE]


def example_of(thing) -> str:
    blocks = re.findall(r"```python\n(.*?)```", thing.__doc__ or "", flags=re.DOTALL)
    return "\n".join("\n".join(line.removeprefix(indent_of(block)) for line in block.splitlines()) for block in blocks)


def indent_of(block: str) -> str:
    return re.match(r" *", block)[0]


CASES = [(package.__name__, name) for package in PACKAGES for name in entry_points(package)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Names that the examples use, and a teacher and a student on disk."""
    root = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}
    Dinov2Model(Dinov2Config(**sizes, num_channels=3)).save_pretrained(root / "teacher")
    load_image_processor(trainers.DIGITS_TEACHER).save_pretrained(root / "teacher")
    teacher = modeling_adala.load_teacher(root / "teacher")
    student = convert(teacher)
    student.save_pretrained(root / "student")
    processor = load_image_processor(trainers.DIGITS_TEACHER)
    digits = modeling_adala.load_teacher(trainers.DIGITS_TEACHER, head="Model")
    data = trainers.DataModule(trainers.DataConfig(dataset="mnist-digits", image_size=28), digits.config, processor)
    images = [{"pixel_values": torch.randn(3, 28, 28), "labels": i % 2} for i in range(4)]
    names = {"torch": torch, "evaluate": evaluate, "image_processor": processor, "dataset": images, "images": images}
    for package in PACKAGES:
        names |= {name: getattr(package, name) for name in package.__all__}
    places = {"facebook/dinov2-small": root / "teacher", "out/2-feature-alignment": root / "student"}
    pair = {"teacher": teacher, "student": student, "data": data}
    digits_pair = {"teacher": digits, "student": convert(digits), "data": data}
    return names, places, pair, digits_pair


@pytest.mark.parametrize(("package", "name"), CASES)
def test_example_runs(package, name, world, tmp_path, monkeypatch):
    names, places, pair, digits_pair = world
    thing = getattr(next(p for p in PACKAGES if p.__name__ == package), name)
    code = example_of(thing)
    assert code, f"{package}.{name} has no example"
    for text, place in places.items():
        code = code.replace(text, str(place))
    monkeypatch.chdir(tmp_path)
    with_data = "data." in code or "mnist-digits" in code
    exec(compile(code, f"{package}.{name}", "exec"), dict(names) | (digits_pair if with_data else pair))
