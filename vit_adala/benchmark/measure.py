"""`bench_model` and `bench_operator`: linear attention beside softmax, size after size."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from modeling_adala.attention_interface import feature_map_of
from modeling_adala.errors import UsageError
from modeling_adala.inspection.flops import head_dim, image_cost, linear_config, num_features
from modeling_adala.inspection.towers import attention_modules
from trainers.runs.memory import peak_of

from . import models, operators, runtimes
from .cases import LINEAR, Case, Row, Settings, Size, compile_now, measure
from .floor import Floor, operator_work

SOFTMAX, COMPILED = "softmax", ", compiled"
# forward pass, gradients of the activations, gradients of the weights: each takes as many products
_FORWARD_BACKWARD = 3


def bench_model(
    config: PretrainedConfig, linear: str, softmax: str, sizes: Iterable[Size], settings: Settings, floor: Floor
) -> Iterator[list[Row]]:
    """Measure a linear and a softmax model side by side, and yield the rows of each size.

    Args:
        config (`PretrainedConfig`): Configuration of the model.
        linear (`str`), softmax (`str`): Names of the two models, see `open_model`.
        sizes (`Iterable[Size]`): Sizes to measure, smallest first.
        settings (`Settings`): How to measure.
        floor (`Floor`): Floor of the machine.

    Raises:
        AdaLAError: If a model gives wrong features.
    """
    names = {LINEAR: linear, SOFTMAX: softmax}
    opened = {kind: models.open_model(name, kind == LINEAR, settings) for kind, name in names.items()}
    references = {kind: models.reference_of(model) for kind, model in opened.items()}
    exported = {
        (kind, form): runtimes.export_features(model, form)
        for form in settings.runtimes
        for kind, model in opened.items()
    }
    pace: dict[str, float] = {}

    def work(kind: str, size: Size) -> int:
        return size.batch * image_cost(config, size.image_size, LINEAR if kind == LINEAR else "sdpa").flops

    def reference(kind: str, pixels: Tensor, expected: dict[str, Tensor]) -> Tensor:
        if kind not in expected:
            expected[kind] = models.expected_features(references[kind], pixels)
        return expected[kind]

    def exported_case(kind: str, form: str, size: Size, pixels: Tensor, expected: dict[str, Tensor]) -> Case:
        label, run = f"{kind}, {form}", partial(exported[kind, form], pixels)

        def check() -> float:
            return models.check_features(label, run(), reference(kind, pixels, expected), pixels)

        skip = runtimes.too_large(config, size) if kind == SOFTMAX else None
        return Case(label, work(kind, size), 0, run, check, skip=skip)

    def case(kind: str, size: Size, pixels: Tensor, expected: dict[str, Tensor], compiled: bool) -> Case:
        label, model = kind + COMPILED * compiled, opened[kind]
        forward = models.forward_of(model, pixels, compiled)
        run = models.forward_backward_of(model, pixels, compiled) if settings.backward else forward

        def check() -> float:
            features = compile_now(label, forward) if compiled else forward()
            return models.check_features(label, features, reference(kind, pixels, expected), pixels)

        peak = partial(peak_of, models.prepare_pass, names[kind], kind == LINEAR, size, settings)
        if settings.device != "cpu":
            peak = partial(peak_of, lambda: run, device=settings.device)
        flops = work(kind, size)
        return Case(
            label,
            flops * _FORWARD_BACKWARD if settings.backward else flops,
            0,
            run,
            check,
            _peak_or_none(peak, compiled, settings),
            compiled,
        )

    for size in sizes:
        torch.compiler.reset()  # otherwise each size counts as a recompilation, and at most eight are allowed
        pixels = models.images_of(config, size, settings)
        expected: dict[str, Tensor] = {}
        variants = [(kind, compiled) for compiled in (False, *[True] * settings.compile) for kind in names]
        cases = [case(kind, size, pixels, expected, compiled) for kind, compiled in variants]
        cases += [exported_case(*which, size, pixels, expected) for which in exported]
        yield measure(size, cases, SOFTMAX, settings, floor, pace)


def bench_operator(
    config: PretrainedConfig, linear: str, sizes: Iterable[Size], settings: Settings, floor: Floor
) -> Iterator[list[Row]]:
    """Measure the attention of the first linear layer without its projections, and the operators that do its work.

    Args:
        config (`PretrainedConfig`): Configuration of the model.
        linear (`str`): Name of the linear model, which the feature map is taken from.
        sizes (`Iterable[Size]`), settings (`Settings`), floor (`Floor`): See `bench_model`.

    Raises:
        UsageError: If no layer of the model is linear.
        AdaLAError: If linear attention gives a wrong result.
    """
    maps = [feature_map_of(module) for module in attention_modules(models.open_model(linear, True, settings))]
    feature_map = next((phi for phi in maps if phi is not None), None)
    if feature_map is None:
        raise UsageError(f"--operator: no layer of {linear!r} is linear (softmax_layers names all of them).")
    config, features = linear_config(config), num_features(linear_config(config))
    pace: dict[str, float] = {}

    def case(name: str, size: Size, compiled: bool) -> Case:
        operator, label = operators.operators(feature_map)[name], name + COMPILED * compiled
        if compiled:
            operator = torch.compile(operator, fullgraph=True, dynamic=False)
        shape = size.batch, config.num_attention_heads, size.tokens, head_dim(config)
        inputs = operators.operator_inputs(*shape, settings.dtype, settings.device, settings.backward)
        run = operators.pass_of(operator, inputs, settings.backward)
        check = partial(operators.check_operator, operator, inputs, feature_map, settings.backward)
        peak = partial(peak_of, operators.prepare_operator, name, feature_map, shape, settings)
        if settings.device != "cpu":
            peak = partial(peak_of, lambda: run, device=settings.device)
        width = size.tokens if name == operators.SDPA else features
        flops, bytes_moved = operator_work(inputs[0], inputs[2], width, settings.backward)
        return Case(
            label,
            flops,
            bytes_moved,
            run,
            partial(compile_now, label, check) if compiled else check if name == LINEAR else None,
            _peak_or_none(peak, compiled, settings),
            compiled,
        )

    for size in sizes:
        torch.compiler.reset()
        variants = [(name, False) for name in operators.operators(feature_map)]
        variants[1:1] = [(LINEAR, True)] * settings.compile
        cases = [case(name, size, compiled) for name, compiled in variants]
        yield measure(size, cases, operators.SDPA, settings, floor, pace)


def _peak_or_none(peak: partial, compiled: bool, settings: Settings) -> partial | None:
    # in the fresh process it would be compiled once more, for minutes
    return None if compiled and settings.device == "cpu" else peak
