"""ViT-B (ViT-L on a GPU) over resolution: linear beside softmax with SDPA, eager, compiled, and as a CUDA graph.

    python -m benchmarks.model            some minutes: 224 to 1,024 pixels, on a GPU to 2,048
    python -m benchmarks.model --full     half an hour more: 2,048 pixels, and every size compiled
    python -m benchmarks.model --smoke    seconds, a tiny ViT

Weights are random: they do not change what a pass costs. Everything at a size runs in turns. The linear models are
first checked against the same weights in float32. "attention for free" is the softmax model with an attention that
returns the values as they are: no attention makes the model faster than that.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel, ViTConfig, ViTModel

from modeling_adala.configuration_adala import AdaLAViTConfig
from modeling_adala.inspection.flops import count_tokens, image_cost
from modeling_adala.modeling_adala import AdaLAViTModel
from trainers.runs.timing import time_in_turns
from vit_adala.benchmark.cases import graph_of, timing_columns
from vit_adala.benchmark.floor import DEFINITION, Floor, measure_floor
from vit_adala.benchmark.models import TOLERANCES, check_features, expected_features, forward_of, reference_of

from .common import (
    Row,
    Run,
    device,
    dtype_name,
    floor_columns,
    floor_facts,
    measure_all,
    parser,
    prepare_all,
    run_script,
)

SOFTMAX, FREE = "softmax", "attention for free"
PAPER, DEFAULT = "linear (elu)", "linear (hedgehog and mixing)"
# options of the linear models: the operator of the paper, and the default
LINEAR: dict[str, dict[str, Any]] = {PAPER: {"feature_map": "elu", "local_mixing": 0}, DEFAULT: {}}
# what is compiled
COMPARED = (SOFTMAX, DEFAULT)
COMPILED_SUFFIX, GRAPH_SUFFIX = ", compiled", ", CUDA graph"
SECONDS = {"cpu": 2.0, "cuda": 0.3}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}


@dataclass(frozen=True)
class Images:
    """One measurement: a batch of square images through all models, or compiled through those that are compared."""

    batch: int
    side: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.side:,} px, batch {self.batch}{COMPILED_SUFFIX * self.compiled}"


def cpu_cases(full: bool) -> list[Images]:
    sides = (224, 384, 512, 768, 1024, *((2048,) if full else ()))
    compiled = [Images(1, side, compiled=True) for side in (sides if full else (224, 512))]
    return [*(Images(1, side) for side in sides), Images(8, 224), *compiled]


def gpu_cases(full: bool) -> list[Images]:
    """Return what was asked for first; a model at a size takes half a minute to compile."""
    first, rest = [(1, 1024), (1, 256)], [(8, 1024), (1, 512), (1, 2048), (8, 256), (1, 224), (8, 512), (8, 224)]
    rest += [(8, 2048)]
    compiled = [Images(batch, side, compiled=True) for batch, side in (*first[::-1], *(rest if full else ()))]
    eager = [Images(batch, side) for batch, side in (*first, *rest)]
    return [*eager[:2], *compiled[:2], *eager[2:], *compiled[2:]]


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--full", action="store_true", help="2,048 pixels, and every size compiled")
    args = options.parse_args(argv)
    where = device()
    cases, shape = (gpu_cases(args.full), LARGE) if where == "cuda" else (cpu_cases(args.full), {})
    if args.smoke:
        cases, shape = [Images(1, 32), Images(1, 64), Images(8, 32)], TINY  # compiled: a minute of a C++ compiler
    models = build(shape, where)
    config = models[DEFAULT].config
    floor = measure_floor(torch.bfloat16, where, 0.05 if args.smoke else 1.0)
    seconds = 0.05 if args.smoke else SECONDS[where]
    measure_all(
        "model",
        cases,
        lambda images: measure(models, images, where, floor, seconds),
        args,
        subject=f"ViT, {config.num_hidden_layers} layers of width {config.hidden_size}, patches of"
        f" {config.patch_size}, random weights",
        tolerance=TOLERANCES[torch.bfloat16],
        floors=floor_facts({"bfloat16": floor}),
        floor_definition=DEFINITION,
    )


def build(shape: dict[str, Any], device: str) -> dict[str, PreTrainedModel]:
    """Return the softmax model, and linear ones with its weights."""
    torch.manual_seed(0)
    softmax = ViTModel(ViTConfig(**shape), add_pooling_layer=False)
    softmax.set_attn_implementation("sdpa")
    free = copy.deepcopy(softmax)
    AttentionInterface.register(FREE, lambda module, query, key, value, *args, **kwargs: (value.transpose(1, 2), None))
    free.set_attn_implementation(FREE)
    models = {SOFTMAX: softmax, FREE: free}
    for name, options in LINEAR.items():
        models[name] = AdaLAViTModel(AdaLAViTConfig(**shape, **options), add_pooling_layer=False)
        # feature maps start at the identity, local mixing at zero
        models[name].load_state_dict(softmax.state_dict(), strict=False)
    return {name: model.to(device, torch.bfloat16).eval().requires_grad_(False) for name, model in models.items()}


def measure(
    models: dict[str, PreTrainedModel], images: Images, device: str, floor: Floor, seconds: float
) -> list[Row]:
    """Return one row per model, and one for its CUDA graph on a GPU."""
    torch.compiler.reset()
    pixels = torch.randn(images.batch, 3, images.side, images.side, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(device, torch.bfloat16)
    errors: dict[str, float] = {}

    def prepare(label: str, forward: Run) -> Run:
        run, model = graph_of(forward) if label.endswith(GRAPH_SUFFIX) else forward, models[label.partition(",")[0]]
        features = run()
        if (
            model.config.model_type == AdaLAViTConfig.model_type
        ):  # the others are PyTorch's own, or no attention at all
            expected = expected_features(reference_of(model), pixels)
            errors[label] = check_features(label, features, expected, pixels)
        return run

    variants: dict[str, Callable[[], Run]] = {}
    for name in COMPARED if images.compiled else models:
        label, forward = name + COMPILED_SUFFIX * images.compiled, forward_of(models[name], pixels, images.compiled)
        for suffix in ("", GRAPH_SUFFIX) if device == "cuda" else ("",):
            variants[label + suffix] = partial(prepare, label + suffix, forward)
    runs, rows = prepare_all(variants)
    timings = time_in_turns(runs, device, seconds) if runs else {}
    for label, timing in timings.items():
        name = label.partition(",")[0]
        config, size = models[name].config, (images.side, images.side)
        cost = image_cost(config, size, "linear" if name in LINEAR else "sdpa")
        flops = images.batch * (cost.flops - (cost.attention_flops if name == FREE else 0))
        rows.append(
            {
                "name": label,
                "dtype": dtype_name(pixels.dtype),
                "batch": images.batch,
                "side": images.side,
                "tokens": count_tokens(config, size),
                **timing_columns(timing),
                "images_per_second": images.batch / timing.median,
                "flops": flops,
                **floor_columns(floor, timing, flops),
                "relative_error": errors.get(label),
            }
        )
    return rows


if __name__ == "__main__":
    run_script(main)
