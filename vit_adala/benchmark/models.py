"""The two models that are timed side by side, linear and softmax, and the check of their features."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hub_cards.records import read_manifest
from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.convert import convert
from modeling_adala.conversion.loading import load_config, load_student, load_teacher, load_teacher_config
from modeling_adala.errors import AdaLAError
from modeling_adala.families import get_family, is_adala
from modeling_adala.inspection.flops import linear_config
from modeling_adala.inspection.towers import attention_modules, forward_features, patch_size, vision_tower
from trainers.alignment_trainer import check_configs
from trainers.data.digits import find_teacher

from .cases import Settings, Size
from .operators import relative_error

# largest relative error of the features against the same weights in float32; 12 to 40 layers round one after another
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def open_model(name: str, linear: bool, settings: Settings) -> PreTrainedModel:
    """Open a model in eval mode, with gradients.

    Args:
        name (`str`): Checkpoint folder, Hub id, or `config.json` for random weights; stock or AdaLA.
        linear (`bool`): Convert a stock model. Otherwise, put an AdaLA model in softmax mode (PyTorch's SDPA).
        settings (`Settings`): Type and device of the weights.
    """
    config = load_config(name)
    is_ours = is_adala(config)
    if Path(name).is_file():
        torch.manual_seed(0)
        model = AutoModel.from_config(config, trust_remote_code=False)
    else:
        model = load_student(name) if is_ours else load_teacher(name)
    if linear and not is_ours:
        model = convert(model, check_parity=False)
    if not linear:
        vision_tower(model).config._attn_implementation = "sdpa"
    return model.to(settings.device, settings.dtype).eval().requires_grad_(True)


def check_source(name: str) -> PretrainedConfig:
    """Return the configuration of a model that can be benchmarked, before its weights are read.

    Raises:
        DataError: If there is no such model.
        UsageError: For an unsupported family.
    """
    config = load_config(name)
    get_family(config.model_type)
    return config


def check_same_shape(config: PretrainedConfig, teacher: str) -> None:
    """Raise `UsageError` unless a softmax checkpoint has the family and the size of a model."""
    check_configs(load_teacher_config(teacher), linear_config(config))


def known_teacher(config: PretrainedConfig) -> str | None:
    """Return the softmax checkpoint that an AdaLA model was converted from, if it is on this machine."""
    name, home = getattr(vision_config(config), "teacher_name_or_path", None), Path(config.name_or_path)
    if not name:
        return None
    # config.json keeps the last part of a local path, the manifest of a run all of it
    noted = read_manifest(home).get("teacher")
    for place in (noted, find_teacher(name), home.parent / name):
        if place and (Path(place) / "config.json").is_file():
            return str(place)
    is_id = not os.path.isabs(name) and name.count("/") <= 1
    return name if is_id and isinstance(try_to_load_from_cache(name, "config.json"), str) else None


def images_of(config: PretrainedConfig, size: Size, settings: Settings) -> Tensor:
    """Return random pixels, `(batch, channels, height, width)`."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(size.batch, vision_config(config).num_channels, *size.image_size, generator=generator)
    return pixels.to(settings.device, settings.dtype)


def forward_of(model: PreTrainedModel, pixels: Tensor, compiled: bool = False) -> Callable[[], Tensor]:
    """Return one pass to the final features, without gradients."""
    run = _features(model, compiled)

    def forward() -> Tensor:
        with torch.no_grad():
            return run(pixels)

    return forward


def forward_backward_of(model: PreTrainedModel, pixels: Tensor, compiled: bool = False) -> Callable[[], object]:
    """Return one pass to the final features and the gradients of all weights that they depend on."""
    run = _features(model, compiled)

    def forward_backward() -> None:
        run(pixels).float().square().mean().backward()
        for parameter in model.parameters():  # as an optimizer leaves them: the next pass allocates its own
            parameter.grad = None

    return forward_backward


def prepare_pass(name: str, linear: bool, size: Size, settings: Settings) -> Callable[[], object]:
    """Open a model and return one pass of it, warmed up by the smallest image, for a fresh process."""
    transformers_logging.disable_progress_bar()  # the parent process shows its own
    model = open_model(name, linear, settings)
    run = forward_backward_of if settings.backward else forward_of
    rows, columns = patch_size(model.config)
    run(model, images_of(model.config, Size(1, (2 * rows, 2 * columns), 4), settings))()
    return run(model, images_of(model.config, size, settings))


def reference_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy in float32 that runs PyTorch's own operators, for `expected_features`."""
    reference = copy.deepcopy(model).float()
    module: Any
    for module in attention_modules(reference):
        module.config.backend = "torch"
    return reference


@torch.no_grad()
def expected_features(reference: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Return the reference's features of a batch's last image, `(1, tokens, hidden_size)`."""
    return forward_features(reference, pixels[-1:].float())


def check_features(name: str, features: Tensor, expected: Tensor, pixels: Tensor) -> float:
    """Return the relative error of the features of a batch's last image against the same weights in float32.

    Args:
        name (`str`): Name of the case.
        features (`Tensor`): Features of the whole batch, `(batch, tokens, hidden_size)`.
        expected (`Tensor`): See `expected_features`.
        pixels (`Tensor`): The batch.

    Raises:
        AdaLAError: If it exceeds the tolerance of the dtype in `TOLERANCES`, or is not a number.
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


def _features(model: PreTrainedModel, compiled: bool) -> Callable[[Tensor], Tensor]:
    def run(pixels: Tensor) -> Tensor:
        return forward_features(model, pixels)

    return torch.compile(run, fullgraph=True, dynamic=False) if compiled else run
