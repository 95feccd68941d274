"""Saved models come back the same: in a fresh process, through pipelines, as LoRA adapters and out of the Trainer."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    BitImageProcessorPil,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessorPil,
)

from modeling_adala import (
    AdaLADinov2Backbone,
    AdaLADinov2ForImageClassification,
    AdaLADinov2Model,
    AdaLAViTForImageClassification,
    AdaLAViTForMaskedImageModeling,
    AdaLAViTModel,
)

REPOSITORY = Path(__file__).parents[3]
SHARED = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
VIT = SHARED | {"intermediate_size": 96, "image_size": 32, "patch_size": 4, "encoder_stride": 4, "num_labels": 5}
DINOV2 = SHARED | {"mlp_ratio": 2, "image_size": 28, "patch_size": 7, "num_labels": 5, "layerscale_value": 1.0}
# Learned feature maps, a hybrid and every head are among them.
MODELS = {
    AdaLAViTModel: {"feature_map": "hedgehog", "feature_map_kwargs": {"feature_dim": 24, "center_keys": True}},
    AdaLAViTForImageClassification: {"feature_map": "t2r"},
    AdaLAViTForMaskedImageModeling: {"feature_map": "relu"},
    AdaLADinov2Model: {"softmax_layers": [-1]},
    AdaLADinov2ForImageClassification: {"feature_map": "relu", "feature_map_kwargs": {"scale": 0.5}},
    AdaLADinov2Backbone: {"feature_map": "hedgehog", "out_features": ["stage1", "stage3"]},
}
NAMES = [model_class.__name__ for model_class in MODELS]


def make(model_class, **options):
    """A small model in eval mode; learned feature maps are off their neutral value."""
    values = (VIT if "ViT" in model_class.__name__ else DINOV2) | options
    model = model_class(model_class.config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tensors(output) -> list[torch.Tensor]:
    return [x for value in output.to_tuple() for x in (value if isinstance(value, tuple) else (value,))]


# --- a fresh process -------------------------------------------------------------------------------------------------

# Opens everything that the parent saved and writes down what it gives. Nothing is imported but what a user imports.
CHILD = """
import sys
from pathlib import Path

import torch
torch.set_num_threads(int(sys.argv[2]))  # the order of additions depends on it

import modeling_adala
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, pipeline
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling

folder, results = Path(sys.argv[1]), {}
auto_classes = {
    "AdaLAViTModel": AutoModel,
    "AdaLAViTForImageClassification": AutoModelForImageClassification,
    "AdaLAViTForMaskedImageModeling": AutoModelForMaskedImageModeling,
    "AdaLADinov2Model": AutoModel,
    "AdaLADinov2ForImageClassification": AutoModelForImageClassification,
    "AdaLADinov2Backbone": modeling_adala.AdaLADinov2Backbone,
}
image = Image.open(folder / "image.png")
with torch.no_grad():
    for name, auto_class in auto_classes.items():
        model = auto_class.from_pretrained(folder / name)
        output = model(torch.load(folder / f"{name}.inputs.pt")).to_tuple()
        processor = AutoImageProcessor.from_pretrained(folder / name)
        results[name] = {
            "class": type(model).__name__,
            "config class": type(AutoConfig.from_pretrained(folder / name)).__name__,
            "implementation": model.config._attn_implementation,
            "tensors": [x for value in output for x in (value if isinstance(value, tuple) else (value,))],
            "processor": type(processor).__name__,
            "processed": processor(image, return_tensors="pt").pixel_values,
        }
    for name in ("AdaLAViTModel", "AdaLADinov2Model"):
        features = pipeline("image-feature-extraction", model=str(folder / name))(image)
        results[name]["pipeline"] = torch.tensor(features)
    for name in ("AdaLAViTForImageClassification", "AdaLADinov2ForImageClassification"):
        results[name]["pipeline"] = pipeline("image-classification", model=str(folder / name))(image, top_k=5)
    import peft
    base = AutoModelForImageClassification.from_pretrained(folder / "AdaLAViTForImageClassification")
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    results["adapter"] = adapted(torch.load(folder / "AdaLAViTForImageClassification.inputs.pt")).logits
torch.save(results, folder / "results.pt")
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory) -> tuple[dict, dict]:
    """What the models gave in this process before they were saved, and what a fresh process makes of the folders."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image.save(folder / "image.png")
    expected = {}
    for model_class, options in MODELS.items():
        name, model = model_class.__name__, make(model_class, **options)
        size = {"height": model.config.image_size, "width": model.config.image_size}
        if "ViT" in name:
            processor = ViTImageProcessorPil(size=size)
        else:
            processor = BitImageProcessorPil(size=size, crop_size=size)
        inputs = torch.randn(2, 3, *size.values())
        processed = processor(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            expected[name] = {
                "tensors": tensors(model(inputs)),
                "processor": type(processor).__name__,
                "processed": processed,
                "pipeline": model(processed),
            }
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        torch.save(inputs, folder / f"{name}.inputs.pt")
        if model_class is AdaLAViTForImageClassification:
            adapted, _ = train_adapter(model)
            adapted.save_pretrained(folder / "adapter")
            with torch.no_grad():
                expected["adapter"] = adapted.eval()(inputs).logits
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(torch.get_num_threads())],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr
    return expected, torch.load(folder / "results.pt")


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_opens_each_head_and_gives_identical_outputs(name, fresh_process):
    expected, actual = (results[name] for results in fresh_process)
    assert actual["class"] == name
    assert actual["config class"] == ("AdaLAViTConfig" if "ViT" in name else "AdaLADinov2Config")
    assert actual["implementation"] == "adala"
    assert len(actual["tensors"]) == len(expected["tensors"]) > 0
    for a, e in zip(actual["tensors"], expected["tensors"]):
        assert torch.equal(a, e)
        assert e.abs().max() > 0.1


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_finds_the_image_processor(name, fresh_process):
    expected, actual = (results[name] for results in fresh_process)
    assert actual["processor"].removesuffix("Pil") == expected["processor"].removesuffix("Pil")
    if actual["processor"] == expected["processor"]:  # torchvision resizes a little differently
        assert torch.equal(actual["processed"], expected["processed"])


@pytest.mark.long
@pytest.mark.parametrize("name", ["AdaLAViTModel", "AdaLADinov2Model"])
def test_feature_extraction_pipeline_gives_the_features(name, fresh_process):
    expected, actual = (results[name] for results in fresh_process)
    if actual["processor"] != expected["processor"]:
        pytest.skip("torchvision resizes a little differently")
    assert torch.equal(actual["pipeline"], expected["pipeline"].last_hidden_state)


@pytest.mark.long
@pytest.mark.parametrize("name", ["AdaLAViTForImageClassification", "AdaLADinov2ForImageClassification"])
def test_classification_pipeline_gives_the_probabilities(name, fresh_process):
    expected, actual = (results[name] for results in fresh_process)
    if actual["processor"] != expected["processor"]:
        pytest.skip("torchvision resizes a little differently")
    probabilities = expected["pipeline"].logits[0].softmax(-1)
    assert {entry["label"] for entry in actual["pipeline"]} == {f"LABEL_{i}" for i in range(5)}
    for entry in actual["pipeline"]:
        assert abs(entry["score"] - probabilities[int(entry["label"][-1])]) < 1e-6


@pytest.mark.long
def test_a_fresh_process_opens_a_lora_adapter_and_gives_identical_outputs(fresh_process):
    expected, actual = (results["adapter"] for results in fresh_process)
    assert torch.equal(actual, expected)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def train_adapter(model) -> tuple[peft.PeftModel, list[float]]:
    """A few steps with LoRA on queries and values, and the losses."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    size = model.config.image_size
    inputs, labels = torch.randn(8, 3, size, size), torch.arange(8) % 5
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(pixel_values=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return adapted, losses


@pytest.mark.parametrize("model_class", [AdaLAViTForImageClassification, AdaLADinov2ForImageClassification])
def test_lora_trains_on_projections_by_name_saves_and_reloads(model_class, tmp_path):
    model = make(model_class)
    model.save_pretrained(tmp_path / "base")
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        before = model(inputs).logits
    adapted, losses = train_adapter(model)
    adapters = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 2 * 2 * 3  # A and B, on q_proj and v_proj, in three layers
    assert losses[-1] < 0.9 * losses[0]
    for name, tensor in adapted.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(tensor, frozen[name.replace(".base_layer", "")]), name
    adapted.eval().save_pretrained(tmp_path / "adapter")
    base = model_class.from_pretrained(tmp_path / "base")
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        trained = adapted(inputs).logits
        assert (trained - before).abs().max() > 1e-2
        assert torch.equal(reloaded(inputs).logits, trained)
        merged = reloaded.merge_and_unload()
        assert type(merged) is model_class
        torch.testing.assert_close(merged(inputs).logits, trained, rtol=0, atol=1e-4)


# --- the stock Trainer -----------------------------------------------------------------------------------------------


class Stripes(torch.utils.data.Dataset):
    """Images of five classes, told apart by which channel or half is bright."""

    def __init__(self, size: int, rows: int = 40):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(rows, 3, size, size, generator=generator) * 0.3
        self.labels = torch.arange(rows) % 5
        for image, label in zip(self.images, self.labels):
            if label < 3:
                image[label] += 1
            else:
                image[:, : size // 2] += 1 if label == 3 else -1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class KeepWeights(TrainerCallback):
    """Copies the weights as they are when training begins, after a checkpoint to resume from was read."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trainer_of(model_class, folder: Path, callbacks=(), **arguments) -> Trainer:
    torch.manual_seed(0)
    model = make(model_class, feature_map="hedgehog", softmax_layers=[1])
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    data = Stripes(model.config.image_size)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings | arguments),
        train_dataset=data,
        eval_dataset=data,
        callbacks=list(callbacks),
    )


def assert_equal_weights(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name].cpu(), expected[name].cpu())]
    assert different == [], f"{len(different)} of {len(expected)} tensors differ"


@pytest.mark.parametrize("model_class", [AdaLAViTForImageClassification, AdaLADinov2ForImageClassification])
def test_stock_trainer_fine_tunes_and_resuming_restores_every_tensor(model_class, tmp_path):
    trainer = trainer_of(model_class, tmp_path)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    checkpoint = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    moved = [name for name, tensor in start.items() if not torch.equal(tensor, checkpoint[name])]
    assert any(".feature_map." in name for name in moved)
    assert any(".q_proj." in name for name in moved)
    keep = KeepWeights()
    resumed = trainer_of(model_class, tmp_path, [keep])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal_weights(keep.weights, checkpoint)
    assert resumed.state.global_step == 8
    assert_equal_weights(resumed.model.state_dict(), trainer.model.state_dict())


@pytest.mark.parametrize("model_class", [AdaLAViTForImageClassification, AdaLADinov2ForImageClassification])
def test_load_best_model_at_end_restores_every_tensor(model_class, tmp_path):
    # The highest loss counts as the best, so that the best is not the last.
    trainer = trainer_of(
        model_class,
        tmp_path,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (4, 8))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert_equal_weights(trainer.model.state_dict(), best)


def test_a_trainer_checkpoint_opens_like_any_saved_model(tmp_path):
    trainer = trainer_of(AdaLAViTForImageClassification, tmp_path, max_steps=2, save_steps=2)
    trainer.train()
    model, info = AdaLAViTForImageClassification.from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal_weights(model.state_dict(), trainer.model.state_dict())
    assert model.config.softmax_layers == [1]
