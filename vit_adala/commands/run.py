"""`vit-adala run`: all stages from a recipe or from flags."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

from modeling_adala.errors import UsageError
from trainers.runs.presets import PRESETS
from trainers.runs.recipe import run_recipe
from trainers.runs.recipe_config import RecipeConfig
from trainers.runs.settings import automatic_layers, build, did_you_mean, fit_type

from ..arguments import CommandParser, parse_settings
from ..doctor.environment_checks import check_cache
from ..interruption import writes_to
from ..recipes import find_recipe


@dataclass
class RunArguments:
    recipe: str | None = field(
        default=None,
        metadata={
            "help": f"YAML file of the settings below, quickstart, or a preset: {', '.join(PRESETS)}.",
            "positional": "RECIPE.yaml",
        },
    )
    from_stage: int | None = field(default=None, metadata={"help": "Run stage N and later stages again."})
    settings: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Any setting, with dots for those of a stage, listed by vit-adala align --help-all.",
            "flag": "set",
            "repeat": True,
        },
    )


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala run [RECIPE.yaml] [--teacher T --dataset D ...]`."""
    parser = CommandParser(
        "run",
        "Run all stages. If it is killed, the same command resumes. Precedence: flags, --set, recipe, defaults.",
        "vit-adala run --teacher facebook/dinov2-small --dataset uoft-cs/cifar10 --image-size 112"
        " --set feature_alignment.max_steps=2000",
        RunArguments,
        RecipeConfig,
    )
    texts = parser.read(arguments)
    run_args = build(
        RunArguments, {item.name: texts.pop(item.name) for item in fields(RunArguments) if item.name in texts}
    )
    overrides, hints = parse_settings(run_args.settings), get_type_hints(RecipeConfig)
    unknown = sorted(set(overrides) - set(hints))
    if unknown:
        hint = did_you_mean(unknown[0], hints)
        raise UsageError(f"--set {unknown[0]}=...: no such setting{hint}; see vit-adala run --help.")
    if automatic_layers(texts.get("softmax_layers")):
        hints |= {"softmax_layers": str}  # the recipe resolves it
    overrides |= {name: fit_type(name, text, hints[name]) for name, text in texts.items()}
    if run_args.recipe in PRESETS and not Path(run_args.recipe).exists():
        config = RecipeConfig.from_settings({"recipe": run_args.recipe, **overrides})
    elif run_args.recipe is not None:
        config = RecipeConfig.from_yaml(find_recipe(run_args.recipe), **overrides)
    else:
        config = RecipeConfig.from_settings(overrides)
    writes_to(config.output_dir)
    check_cache()
    report = run_recipe(config, from_stage=run_args.from_stage)
    print(f"report: {report}")
