"""ViT-B (ViT-L on a GPU) over resolution: linear beside softmax with SDPA, eager and compiled.

    python -m benchmarks.model            some minutes: 224 to 1,024 pixels
    python -m benchmarks.model --full     half an hour more: 2,048 pixels, and every size compiled
    python -m benchmarks.model --smoke    seconds, a tiny ViT

Weights are random: they do not change what a pass costs. Everything at a size runs in turns. The linear models are
first checked against the same weights in float32. "attention for free" is the softmax model with an attention that
returns the values as they are: no attention makes the model faster than that.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel, ViTConfig, ViTModel

from modeling_adala.configuration_adala import AdaLAViTConfig
from modeling_adala.errors import AdaLAError
from modeling_adala.inspection.flops import count_tokens, image_cost
from modeling_adala.modeling_adala import AdaLAViTModel
from trainers.runs.timing import time_in_turns
from vit_adala.benchmark.cases import timing_columns
from vit_adala.benchmark.floor import DEFINITION, measure_floor
from vit_adala.benchmark.models import TOLERANCES, check_features, expected_features, forward_of, reference_of

from .common import dtype_name, floor_columns, floor_facts, parser, progress, write_result

SOFTMAX = "softmax"
MAPS = ("elu", "hedgehog")
FREE = "attention for free"
COMPILED = (SOFTMAX, "linear (elu)")
SIZES, FULL_SIZES, COMPILED_SIZES = (224, 384, 512, 768, 1024), (2048,), (224, 512)
BATCH_8_SIZES = (224,)
# of a ViT-L
CUDA_SIZES = (256, 512, 1024)
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SECONDS = 2.0
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--full", action="store_true", help="2,048 pixels, and every size compiled")
    args = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape: dict[str, Any] = {}
    sizes: tuple[int, ...] = (*SIZES, *(FULL_SIZES if args.full else ()))
    compiled: tuple[int, ...] = sizes if args.full else COMPILED_SIZES
    several: tuple[int, ...] = BATCH_8_SIZES
    if device == "cuda":
        sizes, shape, compiled, several = CUDA_SIZES, LARGE, CUDA_SIZES, CUDA_SIZES
    if args.smoke:
        sizes, shape, compiled, several = (32, 64), TINY | {"image_size": 32}, (), (32,)
    models = build(shape, device)
    config = models["linear (hedgehog)"].config
    floor = measure_floor(torch.bfloat16, device, 0.05 if args.smoke else 1.0)
    cases = [(1, side) for side in sizes] + [(8, side) for side in several]
    rows = []
    for batch, side in progress(cases, "model"):
        pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(device, torch.bfloat16)
        rows += measure(
            models, pixels, device, floor, side in compiled and batch == 1, 0.05 if args.smoke else SECONDS
        )
    write_result(
        "model",
        rows,
        smoke=args.smoke,
        output=args.output,
        device=device,
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
    for name in MAPS:
        model = AdaLAViTModel(AdaLAViTConfig(**shape, feature_map=name), add_pooling_layer=False)
        model.load_state_dict(softmax.state_dict(), strict=False)  # the feature maps start at the identity
        models[f"linear ({name})"] = model
    return {name: model.to(device, torch.bfloat16).eval().requires_grad_(False) for name, model in models.items()}


def measure(
    models: dict[str, PreTrainedModel], pixels: torch.Tensor, device: str, floor: Any, compiled: bool, seconds: float
) -> list[dict[str, Any]]:
    """Return one row per model, eager and, with `compiled`, compiled."""
    torch.compiler.reset()
    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name, model in models.items():
        runs[name] = forward_of(model, pixels)
        if compiled and name in COMPILED:
            runs[f"{name}, compiled"] = forward_of(model, pixels, compiled=True)
        if name in (SOFTMAX, FREE):  # PyTorch's own, or no attention at all
            continue
        expected = expected_features(reference_of(model), pixels)
        for label in [label for label in runs if label.startswith(name)]:
            errors[label] = check_features(label, runs[label](), expected, pixels)
    timings = time_in_turns(runs, device, seconds)
    rows = []
    for name, timing in timings.items():
        config = models[name.removesuffix(", compiled")].config
        size = (pixels.shape[-2], pixels.shape[-1])
        kind = "sdpa" if name.startswith((SOFTMAX, FREE)) else "linear"
        cost = image_cost(config, size, kind)
        flops = len(pixels) * (cost.flops - (cost.attention_flops if name == FREE else 0))
        rows.append(
            {
                "name": name,
                "dtype": dtype_name(pixels.dtype),
                "batch": len(pixels),
                "side": size[0],
                "tokens": count_tokens(config, size),
                **timing_columns(timing),
                "images_per_second": len(pixels) / timing.median,
                "flops": flops,
                **floor_columns(floor, timing, flops),
                "relative_error": errors.get(name),
            }
        )
    return rows


if __name__ == "__main__":
    try:
        main()
    except AdaLAError as error:
        raise SystemExit(f"model: {error}") from error
