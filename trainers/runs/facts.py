"""Facts of a training for its model card: `manifest.json` beside the weights."""

import hashlib
import os
import platform
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from hub_cards.records import find_license, mapping, read_manifest, write_json
from modeling_adala import __version__
from modeling_adala.configuration_adala import vision_config

from ..base_config import AdaLATrainingArguments
from ..data.data_config import DataModule
from ..data.digits import DIGITS_NAME

# Of the settings that all stages share, those that decide how a training goes.
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "seed",
)
# Those that decide it too, but are hardly ever set.
RARE_SETTINGS = (
    "max_grad_norm",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_kwargs",
    "fp16",
    "data_seed",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
# Paths of this machine, which say nothing about a training.
LOCAL_SETTINGS = ("teacher_feature_cache",)


def record_stage(
    directory: str | Path, trainer: Trainer, student: PreTrainedModel, stage: str, **facts: Any
) -> dict[str, Any]:
    """Write the facts of a stage into the `manifest.json` of a checkpoint folder, and return them.

    The stages before it are taken over from the folder that the student was loaded from.

    Args:
        directory (`str` or `Path`): The checkpoint folder.
        trainer (`Trainer`): Its settings, training data and state.
        student (`PreTrainedModel`): What was trained.
        stage (`str`): Name of the stage.
        facts: What the trainer does not know, such as `seconds` and `dataset`; they win.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    # read only where a checkpoint of ours can be: a student built in memory has no path, or its teacher's
    earlier = read_manifest(Path(student.config.name_or_path)) if student.config.name_or_path else {}
    stages = {name: known for name, known in mapping(earlier.get("stages")).items() if name != stage}
    vision = vision_config(student.config)
    found = find_license(vision.teacher_name_or_path, vision.teacher_revision, download=True)
    facts = _trainer_facts(trainer) | facts
    manifest = {
        "teacher_license": earlier.get("teacher_license") or found,
        "versions": software_versions(),
        "stages": {**stages, stage: facts},
    }
    write_json(Path(directory) / "manifest.json", manifest)
    return facts


def training_settings(args: AdaLATrainingArguments) -> dict[str, Any]:
    """Return the settings of a stage that decide its result: a resumed run has to share them."""
    names = (*SETTINGS, *RARE_SETTINGS, *_own_settings(args))
    settings = {name: getattr(args, name) for name in names if name not in LOCAL_SETTINGS}
    return settings | {"num_processes": args.world_size}


def data_facts(data: DataModule) -> dict[str, Any]:
    """Return the dataset's name (`dataset_id` where it is on the Hub), its splits, and the image size in pixels."""
    name, split = str(data.config.dataset), getattr(data.raw_eval, "split", None)
    is_local = name == DIGITS_NAME or not isinstance(data.config.dataset, str) or Path(name).expanduser().exists()
    return {
        "dataset": name,
        "dataset_id": None if is_local else name,
        "train_split": data.config.train_split,
        "eval_split": None if split is None else str(split),
        "image_size": data.image_size,
    }


def software_versions() -> dict[str, str]:
    # not the distribution's: for a wheel of PyPI that leaves out the build, as +cu130
    versions = {"vit-adala": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return versions | {name: version(name) for name in ("transformers", "accelerate", "datasets")}


def hash_weights(model: PreTrainedModel) -> str:
    """Return the SHA-256 of all names and tensors of a model, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_machine() -> str:
    """Return the device and its cores in a few words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def _trainer_facts(trainer: Trainer) -> dict[str, Any]:
    args, state, dataset = trainer.args, trainer.state, trainer.train_dataset
    unused = "num_train_epochs" if args.max_steps > 0 else "max_steps"
    names = [name for name in (*SETTINGS, *_own_settings(args)) if name not in (unused, *LOCAL_SETTINGS)]
    facts = {
        "steps": state.global_step,
        "images_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "machine": describe_machine(),
        "settings": {name: value for name in names if (value := getattr(args, name)) is not None},
    }
    if hasattr(dataset, "summary"):
        facts["images"] = dataset.summary()
    elif hasattr(dataset, "__len__"):
        facts["images"] = f"{len(dataset):,} images"
    ends = [line for line in state.log_history if "train_runtime" in line]
    if ends:
        facts["seconds"] = round(ends[-1]["train_runtime"], 1)
        facts |= {name: ends[-1][name] for name in ("data_wait_share", "peak_memory_mib") if name in ends[-1]}
    # of these weights: the last step's, or the best step's once that has been loaded
    step = state.best_global_step if args.load_best_model_at_end and ends else state.global_step
    evaluated = {name: line[name] for line in state.log_history if line["step"] == step for name in line}
    if "eval_accuracy" in evaluated:
        facts["evaluation"] = {"head_accuracy": evaluated["eval_accuracy"]}
    return facts


def _own_settings(args: AdaLATrainingArguments) -> list[str]:
    """Return the names that a stage's configuration adds to those that all stages share."""
    return sorted({item.name for item in fields(args)} - {item.name for item in fields(AdaLATrainingArguments)})
