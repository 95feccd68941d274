"""The cases of `vit-adala bench`: whole models, or the operator alone in the shape that a model gives it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from modeling_adala.attention_interface import feature_map_of
from modeling_adala.errors import UsageError
from modeling_adala.inspection.flops import head_dim, image_cost, linear_config, num_features
from modeling_adala.inspection.towers import attention_modules, forward_features
from trainers.runs.memory import peak_of

from . import models, operators
from .cases import Case, Size, compiled_or_error
from .floor import OperatorWork

LINEAR, SOFTMAX, SDPA, EAGER = "linear", "softmax", "SDPA", "eager softmax"
COMPILED = ", compiled"
# forward, gradients of the activations, gradients of the weights: as many products each
_FORWARD_BACKWARD = 3
# of N x N weights that eager softmax may take on a CPU, where nothing but the kernel's killer says that it is too much
_EAGER_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Settings:
    """What the measured passes have in common.

    Args:
        dtype (`torch.dtype`): Of weights and inputs.
        device (`str`): `"cpu"` or `"cuda"`.
        backward (`bool`): Forward and backward pass, rather than forward alone.
        compile (`bool`): Compiled passes, too.
    """

    dtype: torch.dtype
    device: str = "cpu"
    backward: bool = False
    compile: bool = False


class ModelSubject:
    """Linear and softmax model side by side.

    Args:
        config (`PretrainedConfig`): Of the model.
        linear (`ModelSource`), softmax (`ModelSource`): Where the two come from.
        settings (`Settings`): How they run.
    """

    baseline = SOFTMAX

    def __init__(
        self,
        config: PretrainedConfig,
        linear: models.ModelSource,
        softmax: models.ModelSource,
        settings: Settings,
    ):
        self.config, self.settings = config, settings
        self.sources = {LINEAR: linear, SOFTMAX: softmax}
        self.models = {name: source.open() for name, source in self.sources.items()}
        self.references = {name: models.reference_of(model) for name, model in self.models.items()}
        self._expected: dict[str, torch.Tensor] = {}  # at the size of the moment

    def cases(self, size: Size) -> Iterator[Case]:
        """Linear and softmax, eager and, if asked for, compiled."""
        self._expected.clear()
        torch.compiler.reset()  # else every size counts as a recompilation, of which there may be eight
        for compiled in (False, True) if self.settings.compile else (False,):
            for name in self.sources:
                yield self._case(name, size, compiled)

    def flops(self, name: str, size: Size) -> int:
        attention = "linear" if name.startswith(LINEAR) else "sdpa"
        flops = size.batch * image_cost(self.config, size.image_size, attention).flops
        return _FORWARD_BACKWARD * flops if self.settings.backward else flops

    def _case(self, name: str, size: Size, compiled: bool) -> Case:
        model, source, label = self.models[name], self.sources[name], name + COMPILED * compiled
        backward, device = self.settings.backward, self.settings.device
        pixels = models.images_of(model.config, size.batch, size.image_size, source)
        run = (models.forward_backward_of if backward else models.forward_of)(model, pixels, compiled)

        def check() -> float:
            with torch.no_grad():
                features = (
                    compiled_or_error(label, models.forward_of(model, pixels, True))
                    if compiled
                    else partial(forward_features, model, pixels)
                )()
            if name not in self._expected:
                self._expected[name] = models.expected_features(self.references[name], pixels)
            return models.check_features(label, features, self._expected[name], pixels)

        def peak() -> int | None:
            if device != "cpu":
                return peak_of(lambda: run, device=device)
            return peak_of(models.prepare_pass, source, size.batch, size.image_size, backward)

        return Case(
            label,
            self.flops(name, size),
            0,
            partial(compiled_or_error, label, run) if compiled else lambda: run,
            check,
            # in the fresh process it would be compiled once more, for minutes
            None if compiled and device == "cpu" else peak,
        )


class OperatorSubject:
    """The attention of the first linear layer, without its projections, beside the others that do its work.

    Args:
        config (`PretrainedConfig`): Of the model.
        linear (`ModelSource`): The linear model, for the feature map.
        settings (`Settings`): How they run.

    Raises:
        UsageError: if no layer of the model is linear.
    """

    baseline = SDPA

    def __init__(self, config: PretrainedConfig, linear: models.ModelSource, settings: Settings):
        self.config, self.settings = linear_config(config), settings
        maps = [feature_map_of(module) for module in attention_modules(linear.open())]
        found = next((phi for phi in maps if phi is not None), None)
        if found is None:
            raise UsageError(f"--operator: no layer of {linear.name!r} is linear (softmax_layers names all of them).")
        self.feature_map = found
        self.operators = operators.operators(found)

    def cases(self, size: Size) -> Iterator[Case]:
        """Ours, eager and, if asked for, compiled; then the others."""
        torch.compiler.reset()
        for name in self.operators:
            yield self._case(name, size, compiled=False)
            if name == LINEAR and self.settings.compile:
                yield self._case(name, size, compiled=True)

    def flops(self, name: str, size: Size) -> int:
        return self._work(name, size).flops

    def _work(self, name: str, size: Size) -> OperatorWork:
        query = torch.empty(self._shape(size), dtype=self.settings.dtype, device="meta")
        softmax = name in (SDPA, EAGER)
        features = size.tokens if softmax else num_features(self.config)
        return OperatorWork.of(query, query, features, self.settings.backward)

    def _shape(self, size: Size) -> tuple[int, int, int, int]:
        return size.batch, self.config.num_attention_heads, size.tokens, head_dim(self.config)

    def _case(self, name: str, size: Size, compiled: bool) -> Case:
        settings, operator, label = self.settings, self.operators[name], name + COMPILED * compiled
        inputs = operators.operator_inputs(
            *self._shape(size), settings.dtype, settings.device, requires_grad=settings.backward
        )
        if compiled:
            operator = torch.compile(operator, fullgraph=True, dynamic=False)
        run = (operators.forward_backward_of if settings.backward else operators.forward_of)(operator, inputs)
        work = self._work(name, size)
        check: Callable[[], float] | None = None
        if name == LINEAR:
            check = partial(operators.check_operator, operator, inputs, self.feature_map, settings.backward)
        refused = None
        needed = operators.eager_bytes(inputs[0])
        if name == EAGER and settings.device == "cpu" and needed > _EAGER_BYTES:
            refused = f"its weights alone need {needed / 2**30:.1f} GiB"

        def peak() -> int | None:
            if settings.device != "cpu":
                return peak_of(lambda: run, device=settings.device)
            return peak_of(prepare_operator, name, self.feature_map, self._shape(size), settings)

        return Case(
            label,
            work.flops,
            work.bytes_moved,
            partial(compiled_or_error, label, run) if compiled else lambda: run,
            check,
            None if compiled and settings.device == "cpu" else peak,
            refused,
        )


def prepare_operator(
    name: str, feature_map: Any, shape: tuple[int, int, int, int], settings: Settings
) -> Callable[[], Any]:
    """Returns one pass of an operator, for a fresh process. A few tokens have warmed it up."""
    operator = operators.operators(feature_map)[name]
    run = operators.forward_backward_of if settings.backward else operators.forward_of
    batch, heads, _, width = shape
    for tokens in (16, shape[2]):
        inputs = operators.operator_inputs(
            batch, heads, tokens, width, settings.dtype, settings.device, settings.backward
        )
        prepared = run(operator, inputs)
        if tokens == 16:
            prepared()
    return prepared
