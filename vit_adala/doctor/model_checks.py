"""Checks of `vit-adala doctor MODEL` on a complete checkpoint folder."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

import modeling_adala
from hub_cards.upstream import get_relative_import_files
from modeling_adala.configuration_adala import ADALA_VERSION, vision_config
from modeling_adala.conversion.checkpoint_safety import check_checkpoint
from modeling_adala.conversion.loading import load_config, load_image_processor, load_student, load_teacher
from modeling_adala.conversion.stored_weights import nonfinite_tensors, read_tensors, weight_files
from modeling_adala.errors import CheckpointError
from modeling_adala.families import is_adala
from modeling_adala.feature_maps import FeatureMap
from modeling_adala.inspection.towers import attention_modules, forward_features, native_size, patch_size
from modeling_adala.mixins import num_special_tokens

from .checks import Check, run_check

CARD_FIELDS = ("license", "library_name", "pipeline_tag", "base_model", "tags")
PROBE_SECONDS = 600


@dataclass
class Subject:
    """Model under examination. Anything that several checks need is loaded once, on first use.

    Args:
        directory (`Path`): Checkpoint folder; for a model of the Hub, its snapshot in the cache.
        images (`Callable`, *optional*): Returns pixel values `(batch, channels, height, width)`, processed for this
            model, or `None`. Called once the folder is known to be safe.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code in the folder, in a separate process.
    """

    directory: Path
    images: Callable[[], Tensor | None] = lambda: None
    trust_remote_code: bool = False

    @cached_property
    def config(self) -> PretrainedConfig:
        return load_config(str(self.directory))

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        files = weight_files(self.directory)
        return {name: tensor.shape for file in files for name, tensor in read_tensors(file).items()}

    @cached_property
    def model(self) -> PreTrainedModel:
        load = load_student if is_adala(self.config) else load_teacher
        return load(str(self.directory), finite=False).eval()  # `finite_weights` reports those

    @cached_property
    def pixel_values(self) -> Tensor | None:
        return self.images()

    @cached_property
    def opened(self) -> dict[str, Any]:
        return run_probe(self.directory)

    @cached_property
    def forward(self) -> tuple[Tensor, dict[int, float]]:
        """Final features of the images, and the smallest normalizer of each linear layer."""
        pixel_values = self.pixel_values
        assert pixel_values is not None  # the checks ask
        smallest: dict[int, float] = {}

        def measure(layer: int, output: tuple[Tensor, Tensor]) -> None:
            query, key = output
            smallest[layer] = (query @ key.mean(dim=2)[..., None]).min().item()

        hooks = [
            feature_map.register_forward_hook(lambda _, args, output, layer=layer: measure(layer, output))
            for layer, feature_map in feature_maps(self.model).items()
        ]
        try:
            with torch.no_grad():
                return forward_features(self.model, pixel_values), smallest
        finally:
            for hook in hooks:
                hook.remove()


def feature_maps(model: PreTrainedModel) -> dict[int, FeatureMap]:
    """Return the feature maps of the linear layers, by layer."""
    found = {layer: getattr(m, "feature_map", None) for layer, m in enumerate(attention_modules(model))}
    return {layer: feature_map for layer, feature_map in found.items() if feature_map is not None}


def run_probe(directory: Path, *options: str) -> dict[str, Any]:
    """Return the findings of vit_adala/doctor/probe.py in a fresh process.

    Raises:
        CheckpointError: With the last line of its error.
    """
    script = Path(__file__).with_name("probe.py")
    paths = [str(Path(modeling_adala.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    process = subprocess.run(
        [sys.executable, "-P", str(script), str(directory.absolute()), *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRANSFORMERS_VERBOSITY": "error"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROBE_SECONDS,
    )
    if process.returncode:
        raise CheckpointError((process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1])
    return json.loads(process.stdout.splitlines()[-1])


# --- the files -------------------------------------------------------------------------------------------------------


def weights(subject: Subject) -> Check:
    """Check that the weights are those of the student alone, without its teacher's."""
    if not subject.shapes:
        return Check("weights", "FAIL", "no safetensors file", "Save the model with save_pretrained.")
    teacher = [name for name in subject.shapes if "teacher" in name.lower()]
    if teacher:
        return Check(
            "weights",
            "FAIL",
            f"{len(teacher)} tensors of a teacher, such as {teacher[0]!r}",
            "Save the student alone, with its own save_pretrained.",
        )
    count = sum(math.prod(shape) for shape in subject.shapes.values())
    return Check("weights", "PASS", f"{len(subject.shapes)} tensors, {count:,} parameters, none of a teacher")


def position_grid(subject: Subject) -> Check:
    """Check that the position embeddings have one entry per patch of the configured image size."""
    config = vision_config(subject.config)
    (height, width), patch = native_size(config), patch_size(config)
    rows, columns = height // patch[0], width // patch[1]
    grid = f"{rows}x{columns} patches ({height}x{width} pixels)"
    stored = {n: s[-2] for n, s in subject.shapes.items() if "position_embedding" in n and "text" not in n}
    # class and distillation tokens have positions, registers have none
    tokens = num_special_tokens(config) - getattr(config, "num_register_tokens", 0)
    for name, positions in stored.items():
        if positions != rows * columns + tokens:
            return Check(
                "position grid",
                "FAIL",
                f"{name!r} holds {positions} positions, but config.json says {grid} and {tokens} tokens before them",
                "Set image_size and patch_size to what the weights were trained at.",
            )
    return Check("position grid", "PASS", grid if stored else f"{grid}; positions are computed, none are stored")


def image_processor(subject: Subject) -> Check:
    """Check that the folder has a valid image processor."""
    if load_image_processor(str(subject.directory)) is not None:
        return Check("image processor", "PASS", "found, with a valid mean and standard deviation")
    remedy = "Save the teacher's image processor into the folder."
    return Check("image processor", "WARN", "missing: users have to guess the normalization", remedy)


def card(subject: Subject) -> Check:
    """Check that README.md has metadata for the Hub and no empty section."""
    path = subject.directory / "README.md"
    remedy = "Write one with hub_cards.write_card(folder) and complete it by hand."
    if not path.is_file():
        return Check("card", "WARN", "no README.md", remedy)
    metadata = metadata_load(path) or {}
    missing = [name for name in CARD_FIELDS if not metadata.get(name)]
    if missing:
        return Check("card", "WARN", f"README.md lacks {', '.join(missing)}", remedy)
    if "More information needed" in path.read_text(encoding="utf-8"):
        return Check("card", "WARN", "README.md has empty sections", remedy)
    return Check("card", "PASS", "README.md has text and metadata")


# --- opening it ------------------------------------------------------------------------------------------------------


def loads_with_the_package(subject: Subject) -> Check:
    """Check that a fresh process opens the model through its Auto class, with every stored tensor and no other."""
    found, name = subject.opened, "loads with the package"
    remedy = "Convert or save the model again with this version."
    for kind, problem in (("missing", "has no stored value"), ("unexpected", "is stored but not part of the model")):
        if found[kind]:
            return Check(name, "FAIL", f"{found[kind][0]!r} {problem}, one of {len(found[kind])}", remedy)
    return Check(name, "PASS", f"{found['class']}, in a fresh process")


def code_files(subject: Subject) -> Check:
    """Check that the Python files in the folder equal those of this package."""
    files = sorted(subject.directory.glob("*.py"))
    if not files:
        return Check("code files", "PASS", "none in the folder")
    version = getattr(vision_config(subject.config), "adala_version", None)
    if version != ADALA_VERSION:
        remedy = f"Install vit-adala {version} to compare them." if version else "Read them before you let them run."
        message = f"written by vit-adala {version or '(unknown version)'}; this is {ADALA_VERSION}, so not compared"
        return Check("code files", "WARN", message, remedy)
    package = Path(modeling_adala.__file__).parent
    altered = [file.name for file in files if not _is_same_file(file, package / file.name)]
    if altered:
        remedy = "Do not let them run; save or push the model again with this version."
        return Check(
            "code files", "FAIL", f"different from those of vit-adala {version}: {', '.join(altered)}", remedy
        )
    return Check("code files", "PASS", f"all {len(files)} are those of vit-adala {version}")


def loads_without_the_package(subject: Subject) -> Check:
    """Check that the code files in the folder are complete and, if allowed to run, give the same outputs."""
    name, auto_map = "loads without the package", getattr(subject.config, "auto_map", None)
    if not is_adala(subject.config):
        return Check(name, "PASS", f"{subject.config.model_type} is part of Transformers")
    if not auto_map:
        remedy = "Save or push it again with this version, or tell its users to import modeling_adala."
        return Check(name, "WARN", "no code in the folder (no auto_map in config.json)", remedy)
    files = {f"{reference.rsplit('.', 1)[0]}.py" for reference in auto_map.values()}
    for file in sorted(files):
        if "--" in file or Path(file).name != file:
            return Check(name, "FAIL", f"auto_map names code outside the folder ({file!r})", "Do not run its code.")
        path = subject.directory / file
        related = get_relative_import_files(str(path)) if path.is_file() else [str(path)]
        missing = [Path(path).name for path in related if not Path(path).is_file()]
        if missing:
            remedy = "Save or push it again with this version."
            return Check(name, "FAIL", f"auto_map needs the code file {missing[0]!r}, which is missing", remedy)
    if not subject.trust_remote_code:
        remedy = "Read the .py files of the folder; --trust-remote-code then runs them."
        return Check(name, "WARN", f"the code files are complete ({', '.join(sorted(files))}); not run", remedy)
    found = run_probe(subject.directory, "--without-package", "--trust-remote-code")
    expected = torch.tensor(subject.opened["outputs"])
    outputs = torch.tensor(found["outputs"])
    if len(outputs) != len(expected) or not torch.allclose(outputs, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        remedy = "Save or push it again, so that code and weights are from the same version."
        return Check(name, "FAIL", "the code in the folder and the package give different outputs", remedy)
    return Check(name, "PASS", f"{found['class']}, in a fresh process, with the same outputs")


# --- its numbers -----------------------------------------------------------------------------------------------------


def finite_weights(subject: Subject) -> Check:
    """Check that the weights are finite."""
    bad = nonfinite_tensors(weight_files(subject.directory))
    if bad:
        remedy = "Training diverged: go back to an earlier checkpoint and lower the learning rate."
        return Check("finite weights", "FAIL", f"NaN or infinity in {len(bad)} tensors, such as {bad[0]!r}", remedy)
    return Check("finite weights", "PASS", "no NaN, no infinity")


def finite_outputs(subject: Subject) -> Check:
    """Check that the features of real images are finite."""
    if subject.pixel_values is None:
        return _no_images("finite outputs")
    features, _ = subject.forward
    if not features.isfinite().all():
        remedy = "See the lines on weights and normalizers; check the image processor's normalization."
        return Check("finite outputs", "FAIL", "NaN or infinity in the features", remedy)
    largest = features.abs().max().item()
    return Check("finite outputs", "PASS", f"{len(features)} images, largest feature {largest:.3g}")


def smallest_normalizer(subject: Subject) -> Check:
    """Check that the normalizer phi(q) z of linear attention is well above the eps that is added to it.

    Below 100 eps, attention weights sum to less than 0.99; below eps, to less than a half.
    """
    name = "smallest normalizer"
    layers = feature_maps(subject.model)
    if not layers:
        return Check(name, "PASS", "no layer is linear")
    if subject.pixel_values is None:
        return _no_images(name)
    _, smallest = subject.forward
    if smallest.keys() != layers.keys():
        remedy = "Open the model with attn_implementation='adala'."
        return Check(name, "WARN", "not measured: the linear layers did not run", remedy)
    # NaN is the worst, which `min` does not find
    worst = min(smallest, key=lambda layer: -math.inf if math.isnan(smallest[layer]) else smallest[layer])
    eps = layers[worst].eps
    values = " ".join(f"{layer}:{value:.1e}" for layer, value in smallest.items())
    message = f"{smallest[worst]:.1e} in layer {worst}, eps is {eps:.0e} (by layer {values})"
    if smallest[worst] >= 100 * eps:
        return Check(name, "PASS", message)
    remedy = "Some queries attend to almost nothing: train stage 1 longer, or convert with feature_map='hedgehog'."
    return Check(name, "WARN" if smallest[worst] >= eps else "FAIL", message, remedy)


def _is_same_file(file: Path, other: Path) -> bool:
    return other.is_file() and file.read_bytes() == other.read_bytes()


def _no_images(name: str) -> Check:
    return Check(name, "WARN", "not measured: no images", "Pass images with --dataset.")


CHECKS: tuple[Callable[[Subject], Check], ...] = (
    weights,
    position_grid,
    image_processor,
    card,
    code_files,
    loads_with_the_package,
    loads_without_the_package,
    finite_weights,
    finite_outputs,
    smallest_normalizer,
)


def safe_to_open(subject: Subject) -> Check:
    """Check that nothing in the folder is dangerous or broken, see `check_checkpoint`."""
    check_checkpoint(subject.directory)
    return Check("safe to open", "PASS", "no links out of the folder, intact safetensors, a valid config.json")


def model_checks(subject: Subject) -> Iterator[Check]:
    """Yield the checks of a model, each as soon as it is done; only the first for a folder that is not safe."""
    safe = run_check(safe_to_open, subject)
    yield safe
    if safe.status != "FAIL":
        yield from (run_check(check, subject) for check in CHECKS)
