"""YAML of recipes and `--set`: null, true and false, numbers, strings, lists and mappings, each spelled out.

YAML 1.2 decides what is a number: `1e-4` is one, while `no` and `2024-01-01` are strings. A name given twice,
aliases, tags and deep nesting, which settings do not need and mistakes or attacks use, are refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from modeling_adala.errors import UsageError

MAX_CHARACTERS = 100_000
MAX_DEPTH = 20

_TAG = "tag:yaml.org,2002:"
_DIGITS = "-+.0123456789"
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a name must be a text", problem_mark=key.start_mark)
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"[-+]?[0-9]+\Z"), list(_DIGITS))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list(_DIGITS))
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


# a string that only YAML 1.2 takes for a number needs quotes as well
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list(_DIGITS))


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML string.

    Raises:
        ValueError: Saying in one line what is wrong, and where.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
    try:
        _check_events(text)
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{error.problem}{f' in line {mark.line + 1}' if mark else ''}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def read_yaml(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        UsageError: If the file cannot be read or holds no mapping.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is not a file")
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(file.read(MAX_CHARACTERS + 1))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UsageError(f"{what} {str(path)!r} could not be read: {reason}; check the file.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{what} {str(path)!r} must hold 'name: value' lines.")
    return content


def dump_yaml(settings: dict[str, Any]) -> str:
    """Return settings as a string that `parse_yaml`, and any other YAML reader, reads as the same values."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _check_events(text: str) -> None:
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases such as *{event.anchor} are not supported; write the value out"
        elif getattr(event, "tag", None) is not None:
            problem = f"tags such as {event.tag.replace(_TAG, '!!')} are not supported; leave it out"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} deep"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
