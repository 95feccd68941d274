"""`vit-adala run`: all stages from a recipe or from flags."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import get_type_hints

from modeling_adala.errors import UsageError
from trainers.recipe import run_recipe
from trainers.recipe_config import RecipeConfig
from trainers.stages import STAGES

from ..arguments import HelpFormatter, parse_settings
from ..recipes import find_recipe


def main(arguments: Sequence[str]) -> None:
    """`vit-adala run [RECIPE.yaml] [--teacher T --dataset D ...]`"""
    parser = argparse.ArgumentParser(
        prog="vit-adala run",
        usage="vit-adala run [RECIPE.yaml] [options]",
        description="Runs all stages. Killed at any point, the same command goes on.",
        epilog="example: vit-adala run --teacher facebook/dinov2-small --dataset uoft-cs/cifar10 --image-size 112"
        " --set feature_alignment.max_steps=2000. Settings win in this order: flags, --set, recipe, default.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("recipe", nargs="?", help="a YAML of the settings below, or quickstart")
    parser.add_argument("--from-stage", "--from_stage", type=int, help="run stage N and those after it again")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, dotted")
    stages = {stage.name.replace("-", "_") for stage in STAGES.values()}
    for item in dataclasses.fields(RecipeConfig):
        if item.name not in stages:
            flags = dict.fromkeys(("--" + item.name.replace("_", "-"), "--" + item.name))
            parser.add_argument(*flags, dest=item.name, metavar="VALUE", help=item.metadata.get("help"))
    parser.add_argument("--help-all", action="store_true", help="the same; stage settings: vit-adala align --help-all")
    if "--help-all" in arguments:
        arguments = ["--help"]
    parsed, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}; see vit-adala run --help")
    overrides = parse_settings(parsed.set)
    names = {item.name for item in dataclasses.fields(RecipeConfig)}
    given = {name: value for name, value in vars(parsed).items() if name in names and value is not None}
    hints = get_type_hints(RecipeConfig)
    for name, value in given.items():  # a path is what it is, whatever YAML would make of 2024 or [a]
        is_text = hints[name] in (str, str | None)
        overrides |= {name: value} if is_text else parse_settings([f"{name}={value}"])
    if parsed.recipe is not None:
        config = RecipeConfig.from_yaml(find_recipe(parsed.recipe), **overrides)
    else:
        unknown_names = sorted(set(overrides) - names)
        if unknown_names:
            raise UsageError(f"--set {unknown_names[0]}=...: no such setting; see vit-adala run --help")
        config = RecipeConfig(**overrides)
    report = run_recipe(config, from_stage=parsed.from_stage)
    print(f"report: {report}")
