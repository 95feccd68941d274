"""Parsers made from the dataclasses, with two levels of help: our own fields, and all of them."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from modeling_adala.errors import UsageError

# inherited from TrainingArguments, but what people look for first
COMMON = {
    "output_dir",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "optim",
    "bf16",
    "seed",
    "save_steps",
    "eval_strategy",
    "dataloader_num_workers",
    "load_best_model_at_end",
    "metric_for_best_model",
}


class HelpFormatter(argparse.HelpFormatter):
    """One spelling per option, in at most 100 columns."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = max(action.option_strings, key=lambda option: ("_" not in option, len(option)))
        if action.nargs == 0:
            return name
        return f"{name} {'VALUE ...' if action.nargs in ('+', '*') else 'VALUE'}"

    def _get_help_string(self, action: argparse.Action) -> str:
        # a bare % in an inherited help text would crash argparse
        text = (action.help or "").replace("%", "%%")
        default = action.default
        shown = default is not None and default is not argparse.SUPPRESS and default != [] and action.nargs != 0
        return text + (f" (default: {str(default).replace('%', '%%')})" if shown and "efault" not in text else "")


class PlainParser(argparse.ArgumentParser):
    """For a command without `Trainer`: positional arguments, one level of help, `UsageError` for what is wrong."""

    def __init__(self, command: str, positional: str, description: str, example: str):
        super().__init__(
            prog=f"vit-adala {command}",
            usage=f"vit-adala {command} {positional} [options]",
            description=description,
            epilog=f"example: {example}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--help-all", action="help", help="the same as --help")

    def error(self, message: str):
        raise UsageError(f"{message}; see {self.prog} --help")


class CommandParser(HfArgumentParser):
    """`HfArgumentParser` that raises `UsageError` and hides inherited options unless `--help-all` is given."""

    def __init__(self, command: str, description: str, types: Sequence[type], example: str):
        super().__init__(
            types,
            prog=f"vit-adala {command}",
            usage=f"vit-adala {command} [options]",
            description=description,
            epilog=f"example: {example}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--help-all", action="store_true", help="show the options inherited from Trainer too")

    def error(self, message: str):
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """One object per dataclass. `--help` and `--help-all` print and exit.

        Raises:
            UsageError: for an unknown option or a value that does not fit.
        """
        if {"-h", "--help", "--help-all"} & set(arguments):
            self._show_help(everything="--help-all" in arguments)
            raise SystemExit(0)
        try:
            *parsed, _ = self.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
        except UsageError:
            raise
        except (ValueError, TypeError, ImportError) as error:  # TrainingArguments asks for what an option needs
            raise UsageError(f"{error}; see {self.prog} --help") from error
        return tuple(parsed)

    def _show_help(self, everything: bool) -> None:
        inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
        ours: list[argparse.Action] = []
        common: list[argparse.Action] = []
        rest: list[argparse.Action] = []
        for action in self._actions:
            name = action.dest.removeprefix("no_")
            group = common if name in COMMON else rest if name in inherited else ours
            group.append(action)
        self._action_groups.clear()
        groups = {"options": ours, "training (transformers.TrainingArguments)": common}
        if everything:
            groups["training, all the others"] = rest
        for title, actions in groups.items():
            self.add_argument_group(title)._group_actions.extend(actions)
        self.print_help()


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`["a=1", "b.c=x"]` as `{"a": 1, "b": {"c": "x"}}`, values read as YAML.

    Raises:
        UsageError: for a pair without `=`, a value that is no YAML, or a name that is both a value and a section.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not all(name.split(".")):
            raise UsageError(f"--set {pair!r} must be NAME=VALUE, such as feature_alignment.max_steps=500.")
        *path, last = name.split(".")
        target = settings
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UsageError(f"--set {pair!r}: {part!r} has a value of its own; set either that or what is in it.")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"--set {pair!r}: the value is no YAML ({reason}); put it in quotes.") from error
        if isinstance(target[last], str) and any(map(str.isdigit, value)):  # YAML 1.1 takes 1e-4 for text
            with contextlib.suppress(ValueError):
                target[last] = float(value)
    return settings


def read_json_dict(name: str, text: str) -> dict[str, Any]:
    """A JSON object from the command line.

    Raises:
        UsageError: if it is none.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"--{name.replace('_', '-')} {text!r} must be a JSON object such as '{{\"scale\": 0.5}}'.")
    return value


def print_json(values: dict[str, Any]) -> None:
    """Results go to stdout, everything else to stderr."""
    json.dump(values, sys.stdout, indent=2, sort_keys=True)
    print()
