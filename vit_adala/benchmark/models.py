"""The two models that are timed beside each other, linear and softmax, and the proof that what is timed is right."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hub_cards.records import read_manifest
from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.convert import convert
from modeling_adala.conversion.loading import load_config, load_student, load_teacher, load_teacher_config
from modeling_adala.errors import AdaLAError, UsageError
from modeling_adala.families import get_family
from modeling_adala.inspection.towers import attention_modules, forward_features, vision_tower

from .operators import relative_error

# largest relative error of the features against the same weights in float32; 12 to 40 layers round one after another
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it attends; a fresh process opens the same one from it.

    Args:
        name (`str`): Checkpoint folder, Hub id, or `config.json` for random weights; stock or AdaLA.
        linear (`bool`): A stock model as its linear conversion, or an AdaLA model in softmax mode (PyTorch's SDPA) if
            `False`.
        dtype (`torch.dtype`), device (`str`): Of the weights.
    """

    name: str
    linear: bool
    dtype: torch.dtype
    device: str = "cpu"

    def open(self) -> PreTrainedModel:
        """In eval mode, with gradients."""
        model = _open(self.name)
        is_ours = model.config.model_type.startswith("adala_")
        if self.linear and not is_ours:
            model = convert(model, check_parity=False)
        if not self.linear:
            vision_tower(model).config._attn_implementation = "sdpa"
        return model.to(self.device, self.dtype).eval().requires_grad_(True)


def check_source(name: str) -> PretrainedConfig:
    """The configuration of a model that can be benchmarked, before any time goes into its weights.

    Raises:
        DataError: if nothing is there.
        UsageError: for an unsupported family.
    """
    config = load_config(name)
    get_family(config.model_type)
    return config


def check_same_shape(config: PretrainedConfig, teacher: str) -> None:
    """Raises `UsageError` unless a softmax checkpoint is of the family and the size of a model."""
    ours, theirs = vision_config(config), vision_config(load_teacher_config(teacher))
    if get_family(ours.model_type) is not get_family(theirs.model_type):
        raise UsageError(
            f"compare={teacher!r} is of type {theirs.model_type!r} and the model of type {ours.model_type!r}; pass the"
            " softmax model of the same family."
        )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UsageError(
                f"compare={teacher!r} and the model differ in {name} ({getattr(theirs, name)} and"
                f" {getattr(ours, name)}); pass a softmax model of the same size."
            )


def known_teacher(config: PretrainedConfig) -> str | None:
    """The softmax checkpoint that an AdaLA model was converted from, if it is on this machine."""
    name, home = getattr(vision_config(config), "teacher_name_or_path", None), Path(config.name_or_path)
    if not name:
        return None
    # of a local path, config.json keeps the last part; a run has noted all of it
    noted = read_manifest(home).get("teacher")
    for place in (noted, name, home.parent / name):
        if place and (Path(place) / "config.json").is_file():
            return str(place)
    is_id = not os.path.isabs(name) and name.count("/") <= 1
    return name if is_id and isinstance(try_to_load_from_cache(name, "config.json"), str) else None


def images_of(config: PretrainedConfig, batch: int, size: tuple[int, int], source: ModelSource) -> Tensor:
    """Random pixels, `(batch, channels, height, width)`."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, vision_config(config).num_channels, *size, generator=generator)
    return pixels.to(source.device, source.dtype)


def forward_of(model: PreTrainedModel, pixels: Tensor, compiled: bool = False) -> Callable[[], Tensor]:
    """One pass to the final features, without gradients."""
    run = _features(model, compiled)

    def forward() -> Tensor:
        with torch.no_grad():
            return run(pixels)

    return forward


def forward_backward_of(model: PreTrainedModel, pixels: Tensor, compiled: bool = False) -> Callable[[], object]:
    """One pass to the final features, and the gradients of all weights that they depend on."""
    run = _features(model, compiled)

    def forward_backward() -> None:
        run(pixels).float().square().mean().backward()
        for parameter in model.parameters():  # as an optimizer leaves them: the next pass allocates its own
            parameter.grad = None

    return forward_backward


def prepare_pass(source: ModelSource, batch: int, size: tuple[int, int], backward: bool) -> Callable[[], Any]:
    """Opens a model and returns one pass of it, for a fresh process. The smallest image has warmed it up."""
    transformers_logging.disable_progress_bar()  # of reading weights: the parent shows its own
    model = source.open()
    run = forward_backward_of if backward else forward_of
    patch = vision_config(model.config).patch_size
    smallest = (2 * patch, 2 * patch) if isinstance(patch, int) else (2 * patch[0], 2 * patch[1])
    run(model, images_of(model.config, 1, smallest, source))()
    return run(model, images_of(model.config, batch, size, source))


def reference_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32 that runs PyTorch's own operators, for `expected_features`.

    A hook on a feature map has the feature map run, which no backend with a phi of its own would do, whatever the
    environment and the configuration ask for.
    """
    reference = copy.deepcopy(model).float()
    for module in attention_modules(reference):
        phi = getattr(module, "feature_map", None)
        if isinstance(phi, nn.Module):
            phi.register_forward_hook(lambda *_: None)
    return reference


@torch.no_grad()
def expected_features(reference: PreTrainedModel, pixels: Tensor) -> Tensor:
    """What the features of a batch's last image should be, `(1, tokens, hidden_size)`."""
    return forward_features(reference, pixels[-1:].float())


def check_features(name: str, features: Tensor, expected: Tensor, pixels: Tensor) -> float:
    """Relative error of the features of a batch's last image against the same weights in float32.

    Args:
        name (`str`): What to call the case.
        features (`Tensor`): Of the whole batch, `(batch, tokens, hidden_size)`.
        expected (`Tensor`): See `expected_features`.
        pixels (`Tensor`): The batch.

    Returns:
        `float`: ‖difference‖ / ‖expected‖.

    Raises:
        AdaLAError: if it exceeds the tolerance of the dtype in `TOLERANCES`, or is no number.
    """
    error, tolerance = relative_error(features[-1:].detach(), expected), TOLERANCES[pixels.dtype]
    if not error <= tolerance:
        dtype = str(pixels.dtype).removeprefix("torch.")
        raise AdaLAError(
            f"{name}, {pixels.shape[-2]}x{pixels.shape[-1]}, batch {len(pixels)} ({dtype}): the features differ from"
            f" the float32 reference by {error:.1e}, more than {tolerance:.0e}; no speed is given for a wrong result."
            " Another --dtype may fit this model; if float32 fails, please report this."
        )
    return error


def _open(name: str) -> PreTrainedModel:
    config = load_config(name)
    if Path(name).is_file():
        torch.manual_seed(0)
        return AutoModel.from_config(config, trust_remote_code=False)
    return load_student(name) if config.model_type.startswith("adala_") else load_teacher(name)


def _features(model: PreTrainedModel, compiled: bool) -> Callable[[Tensor], Tensor]:
    def run(pixels: Tensor) -> Tensor:
        return forward_features(model, pixels)

    return torch.compile(run, fullgraph=True, dynamic=False) if compiled else run
