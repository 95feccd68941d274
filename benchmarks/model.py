"""DINOv2-S, ViT-B and two layers of ViT-L (on a GPU all of ViT-L) over resolution: linear beside softmax with SDPA.

    python -m benchmarks.model            some minutes: 196 to 1,036 pixels; on a GPU to 2,048, and compiled
    python -m benchmarks.model --full     half an hour more: ViT-B at 2,048 pixels, and every size of it compiled
    python -m benchmarks.model --smoke    seconds, a tiny ViT

In bfloat16 where the hardware multiplies it, else in float32. Weights are random: they do not change what a pass
costs; feature maps are folded, as in a trained student. Everything at a size runs in turns. The linear models are
first checked against the same weights in float32. "attention for free" is the softmax model with an attention that
returns the values as they are: no attention makes the model faster than that.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import AttentionInterface, Dinov2Config, Dinov2Model, PreTrainedModel, ViTConfig, ViTModel

from modeling_adala import convert
from modeling_adala.conversion.folding import fold_feature_maps
from modeling_adala.families import is_adala
from modeling_adala.inspection.flops import count_tokens, image_cost
from trainers.base_config import evaluation_dtype
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
PAPER, DEFAULT, DYNAMIC = "linear (elu)", "linear (default)", "linear (dynamic mixing)"
# options of the linear models: the operator of the paper, the default, and kernels of each image
LINEAR: dict[str, dict[str, Any]] = {
    PAPER: {"feature_map": "elu", "local_mixing": 0},
    DEFAULT: {},
    DYNAMIC: {"dynamic_mixing": True},
}
# what is compiled
COMPARED = (SOFTMAX, DEFAULT)
COMPILED_SUFFIX, GRAPH_SUFFIX = ", compiled", ", CUDA graph"
SECONDS = {"cpu": 2.0, "cuda": 0.3}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}
VIT_S, VIT_B, VIT_L, VIT_L_2, VIT_TINY = "DINOv2-S/14", "ViT-B/16", "ViT-L/16", "ViT-L/16, 2 of 24 layers", "tiny"
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    VIT_S: lambda: Dinov2Model(Dinov2Config(**SMALL)),
    VIT_B: lambda: ViTModel(ViTConfig()),
    VIT_L: lambda: ViTModel(ViTConfig(**LARGE)),
    VIT_L_2: lambda: ViTModel(ViTConfig(**LARGE | {"num_hidden_layers": 2})),
    VIT_TINY: lambda: ViTModel(ViTConfig(**TINY)),
}


@dataclass(frozen=True)
class Images:
    """One measurement: a batch of square images through all variants of a model, compiled through those compared."""

    model: str
    batch: int
    side: int
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.model}, {self.side:,} px, batch {self.batch}{COMPILED_SUFFIX * self.compiled}"


def cpu_cases(full: bool) -> list[Images]:
    cases = [Images(VIT_S, batch, side) for batch in (1, 8) for side in (112, 196, 224, 336, 518)]
    cases += [Images(VIT_S, 1, 1036)]
    cases += [Images(VIT_B, batch, side) for batch in (1, 8) for side in (224, 512)]
    cases += [Images(VIT_B, 1, side) for side in (1024, *((2048,) if full else ()))]
    cases += [Images(VIT_L_2, batch, side) for batch, side in ((1, 224), (8, 224), (1, 512), (1, 1024))]
    compiled = (224, 512, 1024) if full else ()
    return cases + [Images(VIT_B, 1, side, compiled=True) for side in compiled]


def gpu_cases(full: bool) -> list[Images]:
    """Return what was asked for first; a model at a size takes half a minute to compile."""
    first, rest = [(1, 1024), (1, 256)], [(8, 1024), (1, 512), (1, 2048), (8, 256), (1, 224), (8, 512), (8, 224)]
    rest += [(8, 2048)]
    compiled = [Images(VIT_L, batch, side, compiled=True) for batch, side in (*first[::-1], *(rest if full else ()))]
    eager = [Images(VIT_L, *sizes) for sizes in (*first, *rest)]
    return [*eager[:2], *compiled[:2], *eager[2:], *compiled[2:]]


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--full", action="store_true", help="2,048 pixels, and every size compiled")
    args = options.parse_args(argv)
    where = device()
    cases = gpu_cases(args.full) if where == "cuda" else cpu_cases(args.full)
    if args.smoke:
        cases = [
            Images(VIT_TINY, 1, 32),
            Images(VIT_TINY, 1, 64),
            Images(VIT_TINY, 8, 32),
        ]  # compiled: a minute of a C++ compiler
    dtype = evaluation_dtype() or torch.float32
    floor = measure_floor(dtype, where, 0.05 if args.smoke else 1.0)
    seconds = 0.05 if args.smoke else SECONDS[where]
    built = lru_cache(maxsize=1)(partial(build, device=where, dtype=dtype))
    measure_all(
        "model",
        cases,
        lambda images: measure(built(images.model), images, where, floor, seconds),
        args,
        subject="random weights",
        tolerance=TOLERANCES[dtype],
        floors=floor_facts({dtype_name(dtype): floor}),
        floor_definition=DEFINITION,
    )


def build(name: str, device: str, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """Return the softmax model of a name in `MODELS`, and linear ones with its weights."""
    torch.manual_seed(0)
    softmax = MODELS[name]().eval()
    softmax.set_attn_implementation("sdpa")
    free = copy.deepcopy(softmax)
    AttentionInterface.register(FREE, lambda module, query, key, value, *args, **kwargs: (value.transpose(1, 2), None))
    free.set_attn_implementation(FREE)
    models = {SOFTMAX: softmax, FREE: free}
    for label, options in LINEAR.items():
        models[label] = convert(softmax, check_parity=False, **options)
        fold_feature_maps(models[label])
    return {label: model.to(device, dtype).eval().requires_grad_(False) for label, model in models.items()}


def measure(
    models: dict[str, PreTrainedModel], images: Images, device: str, floor: Floor, seconds: float
) -> list[Row]:
    """Return one row per model, and one for its CUDA graph on a GPU."""
    torch.compiler.reset()
    pixels = torch.randn(images.batch, 3, images.side, images.side, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(device, next(models[SOFTMAX].parameters()).dtype)
    errors: dict[str, float] = {}

    def prepare(label: str, forward: Run) -> Run:
        run, model = graph_of(forward) if label.endswith(GRAPH_SUFFIX) else forward, models[label.partition(",")[0]]
        features = run()
        if is_adala(model.config):  # the others are PyTorch's own, or no attention at all
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
                "model": images.model,
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
