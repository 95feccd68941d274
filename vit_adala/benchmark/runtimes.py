"""Models exported to ONNX or OpenVINO, timed beside PyTorch."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import UsageError
from modeling_adala.inspection.towers import final_features, vision_tower

from ..export.formats import FORMATS
from ..export.tracing import export_model, model_inputs
from .cases import Size

LABELS = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
# a graph of softmax holds its weights, twice
_LARGEST_WEIGHTS = 2**32


def too_large(config: PretrainedConfig, size: Size) -> str | None:
    """Return why softmax is not measured at a size, if it is not."""
    needed = 2 * 4 * size.batch * vision_config(config).num_attention_heads * size.tokens**2
    return f"the graph's attention weights would take {needed / 1e9:.0f} GB" if needed > _LARGEST_WEIGHTS else None


def export_features(model: PreTrainedModel, form: str) -> Callable[[Tensor], Tensor]:
    """Export the vision tower of a model, for images and batches of any size, and return its way to the features.

    Args:
        model (`PreTrainedModel`): In eval mode, in float32, on the CPU.
        form (`str`): One of `LABELS`.

    Returns:
        `Callable`: Takes pixels `(batch, channels, height, width)`, returns `(batch, tokens, hidden_size)` as
        `forward_features` does.

    Raises:
        UsageError: For a backbone, which returns maps of some stages and not its final features.
        AdaLAError: If the model cannot be exported.
    """
    tower = vision_tower(model)
    if isinstance(tower, BackboneMixin):
        raise UsageError(
            f"runtime={form!r}: {type(model).__name__} is or holds a backbone, whose graph gives maps and no final"
            " features; pass the checkpoint of stage 2."
        )
    with tempfile.TemporaryDirectory() as folder:
        runtime = export_model(tower, form, Path(folder) / f"model{FORMATS[form].suffix}")

    @torch.no_grad()
    def features(pixels: Tensor) -> Tensor:
        outputs = runtime(model_inputs(tower, pixels))
        return final_features(tower, SimpleNamespace(**outputs))

    return features
