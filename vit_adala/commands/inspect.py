"""`vit-adala inspect`: facts of a model, the attention that is or would become linear, and the savings."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PretrainedConfig

from modeling_adala.configuration_adala import LinearAttentionConfig, in_words, pair
from modeling_adala.conversion.loading import load_config
from modeling_adala.families import is_adala
from modeling_adala.inspection.flops import (
    ATTENTIONS,
    break_even,
    count_tokens,
    has_attention_pooling,
    head_dim,
    image_cost,
    linear_config,
    nearest_size,
    num_features,
)
from modeling_adala.inspection.towers import native_size, patch_size, token_groups
from trainers.data.transforms import parse_size

from ..arguments import CommandParser, print_json

SIZES = ("224", "512", "1024", "2048")
CONVENTION = (
    "1 multiply-add = 2 FLOPs; matrix products and convolutions only, as torch.utils.flop_counter counts. Attention is"
    " everything between the q, k, v projections and the output projection. Memory is what training keeps for the"
    " backward pass (batch 1, float32, no checkpointing), without weights and optimizer; eager softmax keeps the N x N"
    " weights, sdpa (PyTorch's fused softmax, the default) does not."
)
TOKENS = {"cls": "class token", "registers": "registers"}
OPTIONS = ("feature_map", "feature_map_kwargs", "local_mixing", "dynamic_mixing")  # of linear attention


@dataclass
class InspectArguments:
    model: str = field(
        metadata={"help": "Folder, config.json, or Hub id in the cache; softmax or linear.", "positional": "MODEL"}
    )
    image_size: list[str] = field(
        default_factory=list,
        metadata={"help": f"Sides in pixels, or HEIGHTxWIDTH. Default: the model's own, {', '.join(SIZES)}."},
    )
    json: bool = field(default=False, metadata={"help": "Print JSON and nothing else on stdout."})


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala inspect MODEL [--image-size S ...] [--json]`."""
    parser = CommandParser(
        "inspect",
        "Describe a model, the attention that linear attention replaces, and the savings. Reads no weights.",
        "vit-adala inspect facebook/dinov2-large --image-size 518 1036x1554",
        InspectArguments,
    )
    (args,) = parser.parse(arguments)
    config = load_config(args.model)
    facts = describe(config) | {"model": args.model}
    sizes: dict[tuple[int, int], dict[str, Any]] = {}
    for size in _sizes(config, args.image_size):  # two may round to the same
        sizes.setdefault(nearest_size(config, size), compare(config, size))
    facts["sizes"] = list(sizes.values())
    if args.json:
        print_json(facts)
    else:
        _show(facts)


def describe(config: PretrainedConfig) -> dict[str, Any]:
    """Return the facts of a stock or an AdaLA model, and which of its attention is, or would become, linear.

    Raises:
        UsageError: For a model that is not supported.
    """
    linear = linear_config(config)
    groups, met = token_groups(config), break_even(config)
    text = getattr(config, "text_config", None)
    softmax = [f"attention of layer {layer} (softmax_layers)" for layer in linear.softmax_layers]
    if has_attention_pooling(linear):
        softmax.append("attention pooling after the last layer (one query, so linear in the tokens already)")
    if text is not None:
        softmax.append(f"text tower ({text.num_hidden_layers} layers)")
    return {
        "model_type": config.model_type,
        "is_linear": is_adala(config),
        "num_hidden_layers": linear.num_hidden_layers,
        "hidden_size": linear.hidden_size,
        "num_attention_heads": linear.num_attention_heads,
        "head_dim": head_dim(linear),
        "patch_size": patch_size(config),
        "tokens_before_patches": {
            name: group.stop - group.start for name, group in groups.items() if group.stop is not None
        },
        "native_size": native_size(config),
        **{name: getattr(linear, name) for name in OPTIONS},
        "features_per_head": num_features(linear),
        "linear_layers": linear.linear_layers,
        "stays_softmax": softmax,
        "break_even": None if met is None else dataclasses.asdict(met),
    }


def compare(config: PretrainedConfig, requested: tuple[int, int]) -> dict[str, Any]:
    """Return the costs of softmax and linear attention at the valid size nearest to `requested`, in pixels."""
    size = nearest_size(config, requested)
    costs = {name: dataclasses.asdict(image_cost(config, size, name)) for name in ATTENTIONS}
    return {"requested": requested, "image_size": size, "tokens": count_tokens(config, size), **costs}


def _sizes(config: PretrainedConfig, given: Sequence[str]) -> list[tuple[int, int]]:
    parsed = [parse_size("image_size", size) for size in given or SIZES]
    sizes = [pair(size) for size in parsed]
    return sizes if given else sorted({native_size(config), *sizes})


def _show(facts: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    extra = [f"{count} {TOKENS[name]}" for name, count in facts["tokens_before_patches"].items()]
    kind = "linear" if facts["is_linear"] else "softmax"
    console.print(f"[bold]{escape(facts['model'])}[/]: {facts['model_type']}, {kind}")
    lines = {
        "layers": f"{facts['num_hidden_layers']}, hidden size {facts['hidden_size']}",
        "heads": f"{facts['num_attention_heads']} of {facts['head_dim']}",
        "tokens": " + ".join([f"patches of {_pixels(facts['patch_size'])}", *extra]),
        "made for": _pixels(facts["native_size"]),
        "linear" if facts["is_linear"] else "would be linear": _converted_layers(facts),
        "stays softmax": "; ".join(facts["stays_softmax"]) or "nothing",
    }
    for name, text in lines.items():
        console.print(f"  [dim]{name:<16}[/]{text}")
    console.print()
    _print_tables(facts["sizes"])
    met = facts["break_even"]
    if met is not None:
        console.print(
            f"\nbreak-even in FLOPs: {met['tokens']:,} tokens ({_pixels((met['image_size'],) * 2)}). In time, it is"
            " higher: expect no gain below some hundred tokens."
        )
    rounded = [size for size in facts["sizes"] if size["requested"] != size["image_size"]]
    if rounded:
        changes = ", ".join(f"{_pixels(size['requested'])} -> {_pixels(size['image_size'])}" for size in rounded)
        console.print(f"rounded to whole patches of {_pixels(facts['patch_size'])}: {changes}")
    console.print(f"[dim]{CONVENTION}[/]")


def _converted_layers(facts: dict[str, Any]) -> str:
    layers = facts["linear_layers"]
    if not layers:
        return "nothing"
    all_of_them = len(layers) == facts["num_hidden_layers"]
    which = f"all {len(layers)} layers" if all_of_them else f"layers {', '.join(map(str, layers))}"
    feature_map, mixing = in_words(LinearAttentionConfig(**{name: facts[name] for name in OPTIONS}))
    return f"attention of {which} ({feature_map}, {facts['features_per_head']} features per head, {mixing})"


def _print_tables(sizes: list[dict[str, Any]]) -> None:
    # side by side, they would not fit a terminal
    console = Console()
    console = Console(width=max(console.width, 100))
    for title, kind, columns, unit in (
        ("FLOPs", "flops", ("sdpa", "linear"), ""),
        ("activation memory", "memory", ATTENTIONS, "B"),
    ):
        table = Table(title=title, title_justify="left", title_style="bold")
        for heading in ("image", "tokens"):
            table.add_column(heading, justify="right", no_wrap=True)
        for part in ("attention", "model"):
            for name in columns:
                label = "softmax" if kind == "flops" and name == "sdpa" else name
                table.add_column(f"{part}\n{label}", justify="right", no_wrap=True)
            if kind == "flops":
                table.add_column("ratio\n", justify="right", no_wrap=True)
        for size in sizes:
            row = [_pixels(size["image_size"]), f"{size['tokens']:,}"]
            for key in (f"attention_{kind}", kind):
                values = [size[name][key] for name in columns]
                row += [_human(value, unit) for value in values]
                row += [f"{values[0] / values[1]:.2f}"] if kind == "flops" else []
            table.add_row(*row)
        console.print(table)


def _human(value: float, unit: str) -> str:
    """Return a number with three digits and an SI prefix."""
    prefixes = iter(" kMGTPE")
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {prefix.strip()}{unit}".strip()


def _pixels(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
