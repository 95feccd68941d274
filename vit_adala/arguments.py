"""Command-line grammar of all commands, made from dataclasses: their fields are the options.

- `--name VALUE` or `--name=VALUE`, with hyphens or underscores; lists as `0 11`, `0,11` or `[0, 11]`;
- switches are flags that also take a value: `--streaming`, `--streaming false`;
- the model that a command works on is positional (`metadata={"positional": "MODEL"}`);
- the options of linear attention are the fields of `LinearAttentionConfig`, in every command that converts.

`trainers.runs.settings` turns the texts of a command line into the types that the fields declare, as it does for
recipes.
"""

import argparse
import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from modeling_adala.errors import UsageError
from modeling_adala.feature_maps import FEATURE_MAPS
from trainers.attention_alignment_config import AttentionAlignmentConfig
from trainers.base_config import AdaLATrainingArguments
from trainers.runs.plain_yaml import parse_yaml
from trainers.runs.settings import NO, YES, automatic_layers, build, did_you_mean

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
INHERITED = {item.name for item in dataclasses.fields(TrainingArguments)}
HELP = ("-h", "--help", "--help-all")
LINEAR_ATTENTION = {
    "feature_map": f"phi, one of {', '.join(sorted(FEATURE_MAPS))}.",
    "feature_map_kwargs": "Options of the feature map, such as '{scale: 0.5}'.",
    "softmax_layers": "Layers that keep softmax, from 0 or, negative, from the end; auto:K measures which.",
    "local_mixing": "Side of a convolution of the values over the patch grid, such as 3; 0 for none.",
    "dynamic_mixing": "Add a kernel to that convolution which two small layers make of the image.",
}


class CommandParser(argparse.ArgumentParser):
    """Parser of one command, made from the dataclasses that its arguments become.

    After `parse`, `given` holds the names of the fields that the command line sets.

    Args:
        command (`str`): Name of the command.
        description (`str`), example (`str`): Texts for `--help`.
        types (`type`): Dataclasses. Metadata of a field: `help`, and `positional` (its name in the usage line),
            `flag` (its option, if that is not the field's name), `short` (one letter, for the same), `repeat` (may be
            given several times), `section` (not an option).
    """

    def __init__(self, command: str, description: str, example: str, *types: type):
        # two columns within 100 characters
        formatter: Any = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=100)
        super().__init__(
            prog=f"vit-adala {command}",
            description=_wrap(description),
            epilog=_wrap(f"example: {example}"),
            formatter_class=formatter,
            allow_abbrev=False,
        )
        self.types, self.given = types, set[str]()
        self.add_argument("--help-all", action="store_true", help="show the options inherited from Trainer, too")
        self._styles: dict[str, str] = {}
        self._shorts: dict[str, str] = {}
        self._is_optional = False
        self._hidden: list[tuple[argparse.Action, str]] = []
        linear = self.add_argument_group("linear attention (LinearAttentionConfig)")
        common = self.add_argument_group("training (transformers.TrainingArguments)")
        rest = self.add_argument_group("training, all the others")
        usage = []
        for kind in types:
            hints = get_type_hints(kind)
            for item in dataclasses.fields(kind):
                if not item.init or "section" in item.metadata or item.name in getattr(kind, "NOT_OFFERED", ()):
                    continue
                if "positional" in item.metadata:
                    usage.append(self._add_positional(item, hints[item.name]))
                elif item.name in LINEAR_ATTENTION:
                    self._add_option(linear, item, hints[item.name])
                elif item.name in COMMON and issubclass(kind, TrainingArguments):
                    self._add_option(common, item, hints[item.name])
                elif item.name in INHERITED and issubclass(kind, TrainingArguments):
                    action = self._add_option(rest, item, hints[item.name])
                    self._hidden.append((action, action.help or ""))
                    action.help = argparse.SUPPRESS
                else:
                    action = self._add_option(self, item, hints[item.name])
                    usage += [f"{action.option_strings[0]} {action.metavar}"] if action.required else []
        self.usage = " ".join([self.prog, *usage, "[options]"])

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return one object per dataclass. `--help` and `--help-all` print and exit.

        Raises:
            UsageError: For an unknown option or a value that does not fit.
        """
        texts = self.read(arguments)
        self.given = set(texts)
        count = automatic_layers(texts.get("softmax_layers"))
        if count:
            del texts["softmax_layers"]
            if AttentionAlignmentConfig not in self.types:
                self.error(
                    f"--softmax-layers auto:{count} chooses layers at the end of stage 1: vit-adala align or run"
                )
            texts["auto_softmax_layers"] = str(count)
        parsed = []
        for kind in self.types:
            names = {item.name for item in dataclasses.fields(kind)}
            settings = {name: value for name, value in texts.items() if name in names}
            made = kind.from_settings if issubclass(kind, AdaLATrainingArguments) else partial(build, kind)
            parsed.append(made(settings))
        return tuple(parsed)

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the texts of the command line, by field."""
        if set(HELP) & set(arguments):
            for action, text in self._hidden if "--help-all" in arguments else []:
                action.help = text
            self.print_help()
            sys.stdout.flush()
            raise SystemExit(0)
        joined, flagged = self._join(arguments)
        given, surplus = self.parse_known_intermixed_args(joined)
        hint = f"--{flagged[1]} takes true or false, not {flagged[0]!r}" if flagged else ""
        if surplus:
            self.error(f"unexpected argument {surplus[0]!r}{hint and '; ' + hint}")
        if flagged and self._is_optional and "/" not in flagged[0] and not Path(flagged[0]).exists():
            self.error(hint)
        texts = vars(given)
        del texts["help_all"]
        return texts

    def _add_positional(self, item: dataclasses.Field, hint: Any) -> str:
        name, required = item.metadata["positional"], item.default is dataclasses.MISSING
        nargs: Any = "+" if hint == list[str] else None if required else "?"
        self._is_optional = nargs == "?"
        action = self.add_argument(item.name, metavar=name, nargs=nargs, help=item.metadata["help"])
        action.default = argparse.SUPPRESS
        return f"{name} ..." if nargs == "+" else name if required else f"[{name}]"

    def _add_option(self, group: Any, item: dataclasses.Field, hint: Any) -> argparse.Action:
        name = item.metadata.get("flag", item.name).replace("_", "-")
        style = "repeat" if "repeat" in item.metadata else _style(hint)
        self._styles[name] = style
        short = [f"-{item.metadata['short']}"] if "short" in item.metadata else []
        self._shorts |= dict.fromkeys(short, f"--{name}")
        default = item.default if item.default_factory is dataclasses.MISSING else None
        shown = default not in (None, False, "", dataclasses.MISSING)
        text = LINEAR_ATTENTION.get(item.name) or item.metadata.get("help", "")
        text += f" (default: {default})" if shown else ""
        return group.add_argument(
            *short,
            f"--{name}",
            dest=item.name,
            action="append" if style == "repeat" else "store",
            required=item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING,
            default=argparse.SUPPRESS,
            metavar={"switch": "[true|false]", "list": "VALUE ...", "repeat": "NAME=VALUE"}.get(style, "VALUE"),
            help=" ".join(text.split()).replace("%", "%%"),
        )

    def _join(self, arguments: Sequence[str]) -> tuple[list[str], tuple[str, str] | None]:
        """Write every option as `--name=value`, which argparse parses unambiguously.

        Returns:
            The arguments, and the first that follows a switch without being true or false, with that switch.
        """
        waiting, joined, flagged = list(arguments), [], None
        while waiting:
            word = waiting.pop(0)
            word = self._shorts.get(word, word)
            if word == "--":
                joined += [word, *waiting]
                break
            if not _is_option(word):
                joined.append(word)
                continue
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("_", "-")
            style = self._styles.get(name)
            if style is None:
                self._refuse(word, name)
            if not equals and style == "switch":
                value = "true"
                if waiting and waiting[0].lower() in YES | NO:
                    value = waiting.pop(0)
                elif waiting and not _is_option(waiting[0]) and flagged is None:
                    flagged = waiting[0], name
            elif not equals:
                values: list[str] = []
                while waiting and not _is_option(waiting[0]) and (style == "list" or not values):
                    values.append(waiting.pop(0))
                if not values:
                    self.error(f"argument --{name}: expected a value")
                value = ",".join(values)
            joined.append(f"--{name}={value}")
        return joined, flagged

    def _refuse(self, word: str, name: str) -> NoReturn:
        for kind in self.types:
            reason = getattr(kind, "NOT_OFFERED", {}).get(name.replace("-", "_"))
            if reason is not None:
                raise UsageError(f"--{name} is not for commands and recipes: {reason}.")
        known = [f"--{other}" for other in self._styles]
        self.error(f"unknown option {word.partition('=')[0]!r}{did_you_mean(f'--{name}', known)}")


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return `["a=1", "b.c=x"]` as `{"a": 1, "b": {"c": "x"}}`, values read as YAML.

    Raises:
        UsageError: For a pair without `=`, a value that is not YAML, or a name that is both a value and a section.
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
            target[last] = parse_yaml(value)
        except ValueError as error:
            raise UsageError(f"--set {pair!r}: the value cannot be read ({error}); put it in quotes.") from error
    return settings


def print_json(values: dict[str, Any]) -> None:
    """Print a result on stdout; everything else goes to stderr."""
    json.dump(values, sys.stdout, indent=2, sort_keys=True)
    print()


def _wrap(text: str) -> str:
    """Break lines at spaces only, so that an example can be copied."""
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def _style(hint: Any) -> str:
    """Return how an option of this type is written: `"switch"`, `"list"` or `"value"`."""
    kinds = [get_origin(kind) or kind for kind in (*get_args(hint), hint)]
    if list in kinds:
        return "list"
    return "switch" if bool in kinds and str not in kinds and dict not in kinds else "value"


def _is_option(word: str) -> bool:
    """Return whether a word starts an option; `-1`, `-1,-2`, `-.5`, `-inf` and `-nan` are values."""
    return len(word) > 1 and word[0] == "-" and re.match(r"-(\d|\.|inf|nan)", word.lower()) is None
