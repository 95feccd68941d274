"""Which attention modules of a model are linear, which attend with softmax, and why: one forward pass tells.

`attn_implementation="adala"` is only a name. A model asks for it through Transformers' attention interface, or
ignores it without a word and attends with softmax. `check_linear` watches the interface and every softmax while the
model runs, so it reports what happened and not what the configuration says.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from ..attention_interface import feature_map_of
from ..configuration_adala import pair
from ..conversion.upstream import attention_functions
from ..errors import UsageError
from .towers import eval_mode


@dataclass(frozen=True)
class LinearReport:
    """Findings of `check_linear`. `str(report)` is a short table.

    Args:
        model (`str`): Class name of the model.
        linear (`dict[str, str]`): Name of each linear attention module, and its feature map.
        softmax (`dict[str, str]`): Name of each attention module that attended with softmax, and why.
        not_run (`list[str]`): Attention modules that the forward pass did not reach: nothing is known of them.
    """

    model: str
    linear: dict[str, str] = field(default_factory=dict)
    softmax: dict[str, str] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)

    @property
    def is_linear(self) -> bool:
        """True if attention ran and all that ran is linear."""
        return bool(self.linear) and not self.softmax

    def raise_if_softmax(self) -> None:
        """For those who want no softmax at all.

        Raises:
            UsageError: if an attention module attended with softmax, or none is linear.
        """
        if not self.is_linear:
            name, reason = next(iter(self.softmax.items()), ("no attention module", "ran"))
            raise UsageError(f"{self.model} is not all linear ({len(self.softmax)} softmax): {name}: {reason}.")

    def __str__(self) -> str:
        rows = {"linear": self.linear, "softmax": self.softmax, "not run": dict.fromkeys(self.not_run, "")}
        counts: dict[tuple[str, str, str], int] = {}
        for kind, modules in rows.items():
            for name, reason in modules.items():
                key = (kind, re.sub(r"\b\d+\b", "*", name), reason)  # one line for all layers
                counts[key] = counts.get(key, 0) + 1
        width = max((len(name) for _, name, _ in counts), default=0)
        total = len(self.linear) + len(self.softmax)
        lines = [f"{self.model}: {len(self.linear)} of {total} attention modules are linear"]
        lines += [f"  {kind:7}  {name:{width}}  x{n:<3} {why}".rstrip() for (kind, name, why), n in counts.items()]
        return "\n".join(lines)


def check_linear(model: PreTrainedModel | PretrainedConfig, *inputs, **kwargs) -> LinearReport:
    """Run a model once, without gradients and in eval mode, and return which of its attention modules are linear.

    Attention that a model keeps on softmax for a stated reason is reported: a tower on another `attn_implementation`,
    a `feature_map` of `None` (`softmax_layers`), `nn.MultiheadAttention` such as SigLIP's pooling head, which
    Transformers never dispatches. Attention that was told to be linear and is not is refused.

    Args:
        model (`PreTrainedModel` or `PretrainedConfig`): The model. Of a configuration, a model with random weights is
            built with `attn_implementation="adala"`: what would become of a checkpoint, before its weights are read.
        inputs, kwargs (*optional*): Those of the model's `forward`. Default: two random images of the configured size
            (`pixel_values`, or frames of a video), and a few tokens where the model takes `input_ids`.

    Raises:
        UsageError: for a family that does not know `"adala"` (SAM, data2vec-vision), that ignores it and attends with
            softmax (BLIP's vision tower, ViTDet, TimeSformer), or whose attention a linear form cannot express (BEiT's
            and Swin's position bias, Pixtral's block mask of several images, causal text); and if no inputs can be
            made up.

    Example:

    ```python
    from transformers import AutoModel

    model = AutoModel.from_pretrained("facebook/dinov2-small", attn_implementation="adala")
    print(check_linear(model))
    ```
    """
    if isinstance(model, PretrainedConfig):
        model = _build(model)
    made_up = not (inputs or kwargs)
    if made_up:
        kwargs = _dummy_inputs(model)
    watch = _Watch(model)
    try:
        with torch.no_grad(), eval_mode(model), watch.listening():
            model(*inputs, **kwargs)
    except UsageError as error:
        # the hook that ends a module's turn has not run
        raise UsageError(f"{model.config.model_type}: {watch.name(watch.running[-1])}: {error}") from None
    except Exception as error:
        if made_up:
            raise _no_inputs(model, f"its forward raised {type(error).__name__}: {error}") from error
        raise
    return watch.report()


class _Watch(TorchFunctionMode):
    """Notes which module called which attention interface, and which attention module called softmax by itself."""

    SOFTMAX = ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward")

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []  # innermost last
        self.ran: set[nn.Module] = set()
        self.dispatched: dict[nn.Module, str] = {}  # to the implementation
        self.undispatched: dict[nn.Module, PreTrainedModel] = {}  # to the tower that it is part of
        self.in_interface = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        interfaces = attention_functions()
        originals = dict(interfaces)
        interfaces.update({name: partial(self._interface, name, f) for name, f in originals.items()})
        try:
            with register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave), self:
                yield
        finally:
            interfaces.update(originals)

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self.running.append(module)
        self.ran.add(module)

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        self.running.pop()

    def _interface(self, implementation: str, function: Callable, module: nn.Module, *args, **kwargs):
        self.dispatched[module] = implementation
        self.in_interface = True  # a softmax in there is the implementation's own, or that of a feature map
        try:
            return function(module, *args, **kwargs)
        finally:
            self.in_interface = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.SOFTMAX and self.running and not self.in_interface:
            owners = [module for module in self.running if not isinstance(module, nn.Softmax)]
            # routers, matchers and heads also normalize with softmax
            if owners and (name != "softmax" or _is_attention(owners[-1])):
                self.undispatched[owners[-1]] = [x for x in self.running if isinstance(x, PreTrainedModel)][-1]
        return func(*args, **(kwargs or {}))

    def name(self, module: nn.Module) -> str:
        return self.names.get(module) or type(module).__name__

    def report(self) -> LinearReport:
        report = LinearReport(type(self.model).__name__)
        for module, implementation in self.dispatched.items():
            feature_map = feature_map_of(module)
            if implementation != "adala":
                report.softmax[self.name(module)] = f"attn_implementation={implementation!r}"
            elif feature_map is None:
                report.softmax[self.name(module)] = "its feature_map is None: a softmax layer on purpose"
            else:
                report.linear[self.name(module)] = type(feature_map).__name__
        ignoring = []
        for module, tower in self.undispatched.items():
            kind, name, implementation = type(module).__name__, self.name(module), tower.config._attn_implementation
            report.linear.pop(name, None)
            if isinstance(module, nn.MultiheadAttention):
                report.softmax[name] = "nn.MultiheadAttention, which Transformers never dispatches"
            elif implementation == "eager" and tower._can_set_attn_implementation():
                report.softmax[name] = "attn_implementation='eager'"
            else:
                report.softmax[name] = f"{kind} attends by itself, whatever attn_implementation says"
                ignoring += [name] if implementation == "adala" or not report.linear else []
        if ignoring:
            more = f" (and {len(ignoring) - 1} more)" if len(ignoring) > 1 else ""
            raise UsageError(
                f"{self.model.config.model_type}: {ignoring[0]}{more}: {report.softmax[ignoring[0]]}; keep 'sdpa'"
                " there, or choose a family that dispatches its attention."
            )
        seen = {*self.dispatched, *self.undispatched}
        for module in self.model.modules():
            inner = [child for child in module.modules() if child is not module and _is_attention(child)]
            if _is_attention(module) and not inner and module not in self.ran | seen:
                report.not_run.append(self.name(module))
        return report


def _is_attention(module: nn.Module) -> bool:
    return re.search("attention|attn", type(module).__name__, re.IGNORECASE) is not None


def _build(config: PretrainedConfig) -> PreTrainedModel:
    family = config.model_type
    if type(config) not in MODEL_MAPPING:  # AutoModel would import all of Transformers to say so
        raise UsageError(
            f"AutoModel does not build {type(config).__name__} ({family}); build the model that uses it with"
            " attn_implementation='adala' and pass that."
        )
    try:
        return AutoModel.from_config(config, attn_implementation="adala", trust_remote_code=False)
    except KeyError as error:
        if error.args != ("adala",):
            raise
        raise UsageError(
            f"{family} takes its attention modules from a fixed table, which has no attn_implementation='adala'; keep"
            " 'sdpa', or choose a family that dispatches its attention."
        ) from None


def _dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two random images (or clips) of the configured size and the library's dummy tokens, as `forward` asks."""
    names = signature(model.forward).parameters
    configs = [model.config, *(getattr(model.config, name) for name in model.config.sub_configs)]

    def setting(*fields: str, default: int) -> int:
        found = [getattr(config, name) for name in fields for config in configs if getattr(config, name, None)]
        return found[0] if found else default

    inputs = {}
    if "spatial_shapes" in names:  # SigLIP 2 takes patches, padded to a common number
        side = int(setting("num_patches", default=256) ** 0.5)
        width = setting("num_channels", default=3) * setting("patch_size", default=16) ** 2
        inputs["pixel_values"] = torch.randn(2, side**2, width)
        inputs["pixel_attention_mask"] = torch.ones(2, side**2, dtype=torch.long)
        inputs["spatial_shapes"] = torch.full((2, 2), side)
    elif pixels := next((name for name in ("pixel_values", "pixel_values_videos") if name in names), None):
        height, width = pair(setting("image_size", "crop_size", default=224))
        frames = setting("num_frames", "frames_per_clip", default=0)
        shape = (2, frames) if frames else (2,)
        inputs[pixels] = torch.randn(*shape, setting("num_channels", "in_chans", default=3), height, width)
    if "input_ids" in names:
        inputs["input_ids"] = model.dummy_inputs["input_ids"]
    if not inputs:
        raise _no_inputs(model, f"its forward takes {', '.join(names)}")
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else None) for name, x in inputs.items()}


def _no_inputs(model: PreTrainedModel, why: str) -> UsageError:
    return UsageError(
        f"no inputs could be made up for {type(model).__name__} ({why}); pass those of its forward, as in"
        " check_linear(model, pixel_values=...), or check a tower of it alone."
    )
