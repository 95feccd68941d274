"""Start of a new head in stage 3: fitted to the features of the pretrained backbone before anything moves.

A head that starts at random tells the backbone nothing but noise, which costs much of what it has learned: "linear
probing, then fine-tuning" (Kumar et al. 2022, arXiv 2202.10054). Linear students feel it more than their teachers
(docs/experiments.md).
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from modeling_adala.errors import AdaLAError
from modeling_adala.inspection.towers import eval_mode, vision_tower

from .evaluation.dense_probe import CHUNK, class_shares
from .softmax_regression import fit_softmax_regression
from .teacher_term import forward_inputs

# features that are kept at most, in numbers: 1 GiB in float32
LARGEST_BANK = 2**28


def head_layers(model: PreTrainedModel) -> tuple[nn.BatchNorm2d | None, nn.Linear | nn.Conv2d] | None:
    """Return the trained layers of a linear head, a batch norm if there is one; `None` for any other head."""
    tower = vision_tower(model)
    inside = set(tower.modules())
    layers = [
        module
        for module in model.modules()
        if module not in inside and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    norm = layers.pop(0) if layers and isinstance(layers[0], nn.BatchNorm2d) else None
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear | nn.Conv2d):
        return None
    fits = layers[0].weight.shape[0] == model.config.num_labels > 1 and layers[0].weight[0, 0].numel() == 1
    return (norm, layers[0]) if fits else None


def is_new(layer: nn.Linear | nn.Conv2d) -> bool:
    """Return whether a layer was never trained: Transformers starts a bias at zero, and no optimizer leaves it there.

    One on the meta device, which gets its weights from another process, is not.
    """
    return layer.bias is not None and not layer.bias.is_meta and not layer.bias.any()


def fit_head(model: PreTrainedModel, batches: Iterable[dict[str, Any]], *, autocast: Any = None) -> int:
    """Fit a linear head to features of the model, and return the number of images that it took.

    The loss is the cross-entropy of the classes: of an image, or of a patch as the share that each class has of it.
    The features are standardized before the fit, in the batch norm of the head if it has one.

    Args:
        model (`PreTrainedModel`): Image classifier or semantic segmentation model with a linear head; its head is
            changed in place.
        batches (`Iterable`): With `pixel_values`, and `labels` as int64 of shape `(batch,)` or `(batch, height,
            width)`. As many are taken as 1 GiB of features allows.
        autocast (*optional*): Context of the forward passes.

    Raises:
        AdaLAError: If the features are not finite.
    """
    layers = head_layers(model)
    assert layers is not None  # the caller has looked
    norm, layer = layers
    features, targets = collect(model, norm or layer, batches, autocast or nullcontext())
    if not features:
        return 0
    dims = [dim for dim in range(features[0].ndim) if dim != 1]
    together = torch.cat(features)
    variance, mean = torch.var_mean(together, dim=dims, correction=0)
    eps = 1e-5 if norm is None else norm.eps
    scale = (variance + eps).rsqrt()
    shape = [1, -1, *[1] * (together.ndim - 2)]
    together.sub_(mean.view(shape)).mul_(scale.view(shape))
    if not together.isfinite().all():
        raise AdaLAError("the features that the head is fitted to are not finite; the backbone's training diverged.")
    shares = torch.cat(targets)
    channels, classes = together.shape[1], shares.shape[1]
    fitted = nn.Linear(channels, classes) if together.ndim == 2 else nn.Conv2d(channels, classes, kernel_size=1)
    decay = max(1e-4, channels / together.numel())  # of a row, as scikit-learn's default
    with torch.enable_grad():
        parts = together.split(CHUNK), shares.split(CHUNK)
        fit_softmax_regression(fitted, *parts, weight_decay=decay)
    weight, bias = fitted.weight.detach(), cast(Tensor, fitted.bias).detach()
    if norm is None:
        weight = weight * scale.view(shape)
        bias = bias - weight.flatten(1) @ mean
    else:
        running = {"running_mean": mean, "running_var": variance, "num_batches_tracked": torch.tensor(len(features))}
        norm.load_state_dict({"weight": torch.ones_like(mean), "bias": torch.zeros_like(mean), **running})
    layer.load_state_dict({"weight": weight.view_as(layer.weight), "bias": bias})
    return len(together)


@torch.no_grad()
def collect(
    model: PreTrainedModel, first: nn.Module, batches: Iterable[dict[str, Any]], autocast: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs of the head's first layer, channels second, and the class probabilities, on the CPU."""
    features, targets, device = list[Tensor](), list[Tensor](), next(model.parameters()).device
    classes = model.config.num_labels
    handle = first.register_forward_pre_hook(lambda module, args: features.append(args[0].float().cpu()))
    try:
        with eval_mode(model), autocast:
            for batch in batches:
                labels = batch.get("labels")
                if not isinstance(labels, Tensor) or labels.is_floating_point():
                    return [], []  # the head's own loss knows what these are
                model(**forward_inputs(model, batch["pixel_values"].to(device)))
                shape, labels = features[-1].shape, labels.cpu()
                if len(shape) == 2:
                    targets.append(F.one_hot(labels, classes).float())
                else:
                    targets.append(class_shares(labels, classes, (shape[2], shape[3])))
                if sum(part.numel() for part in features) >= LARGEST_BANK:
                    break
    finally:
        handle.remove()
    return features, targets
