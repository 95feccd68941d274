"""Settings from a command line, a recipe or Python: their types and ranges, and the messages for others."""

import contextlib
import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from modeling_adala.errors import UsageError

from .plain_yaml import parse_yaml

YES, NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}

_KINDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "a mapping"}
_PLAIN = (*_KINDS, type(None))
_Config = TypeVar("_Config")


class Interval(NamedTuple):
    """Allowed values of a number, as `metadata={"range": Interval(1)}` of a dataclass field.

    Args:
        low (`float`), high (`float`, *optional*): The bounds.
        above (`bool`, *optional*), below (`bool`, *optional*): Whether `low` and `high` themselves are left out.
        also (`float`, *optional*): One value more.
    """

    low: float
    high: float = 1e9
    above: bool = False
    below: bool = False
    also: float | None = None

    def complaint(self, value: float) -> str | None:
        """Return what a value must be, or `None` if it is."""
        if value == self.also:
            return None
        least = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        least += "" if self.also is None else f", or {self.also:g}"
        if not math.isfinite(value):
            return f"must be a finite number, {least}"
        if value < self.low or (self.above and value == self.low):
            return f"must be {least}"
        if value > self.high or (self.below and value == self.high):
            return f"must be {f'below {self.high:g}' if self.below else f'at most {self.high:.10g}'}"
        return None


def build(config_class: type[_Config], settings: Mapping[str, Any], where: str = "") -> _Config:
    """Make a config of strings from a command line or values from a recipe.

    Args:
        config_class (`type`): A dataclass.
        settings (`dict`): Values by field; they are converted to what the fields declare.
        where (`str`, *optional*): What to put before the name of a setting in a message, such as `"supervised."`.

    Raises:
        UsageError: Naming the setting and the remedy.
    """
    known = {item.name for item in dataclasses.fields(config_class) if item.init}  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UsageError(f"{where}{name}: {config_class.__name__} has no such setting{hint}; leave it out.")
    hints = get_type_hints(config_class)
    values = {name: fit_type(where + name, value, hints[name]) for name, value in settings.items()}
    try:
        return config_class(**values)
    except UsageError as error:
        raise UsageError(f"{where}{error}") from error
    except Exception as error:  # TrainingArguments and accelerate complain in types of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{where.rstrip('.') or 'settings'}: {reason}") from error


def check_settings(config: Any, ranges: Mapping[str, Interval]) -> None:
    """Convert numbers, switches and lists to what the fields of a dataclass declare, and refuse what is out of range.

    Args:
        config: The object. The range and the choices of a field are in its metadata.
        ranges (`Mapping[str, Interval]`): Ranges of inherited fields.

    Raises:
        UsageError: For the first field that does not fit.
    """
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if str not in (hints[item.name], *get_args(hints[item.name])):
            value = fit_type(item.name, value, hints[item.name])
            setattr(config, item.name, value)
        choices = item.metadata.get("choices")
        if choices and value is not None and value not in choices:
            hint = did_you_mean(str(value), map(str, choices))
            raise UsageError(f"{item.name}={value!r} is unknown{hint}; choose one of {', '.join(map(str, choices))}.")
        allowed = item.metadata.get("range") or ranges.get(item.name)
        if allowed is not None and isinstance(value, int | float) and not isinstance(value, bool):
            complaint = allowed.complaint(value)
            if complaint is not None:
                raise UsageError(f"{item.name}={value!r} {complaint}.")


def fit_type(name: str, value: Any, hint: Any) -> Any:
    """Return a value from YAML or a command line as the type that a field declares.

    A string may stand for a number, for true or false, for a list (`0,11` or `[0, 11]`) or a mapping (`{scale: 2}`); a
    list of one needs no brackets. Objects that no YAML holds, such as a dataset, pass, and so does what a field of
    another type is given.

    Raises:
        UsageError: Naming the setting and what it must be.
    """
    allowed = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in allowed]
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if enums and isinstance(value, str):
        return _choose(name, value, enums[0])
    if type(value) not in _PLAIN or not all(kind in _PLAIN for kind in kinds):
        return value
    if value is None and type(None) not in kinds and {list, dict} & set(kinds):
        return list() if list in kinds else dict()
    if list in kinds and not isinstance(value, list) and value is not None:
        if isinstance(value, str) and (str not in kinds or "," in value):
            value = [part for part in re.split(r"[,\s]+", value.strip().removeprefix("[").removesuffix("]")) if part]
        elif str not in kinds:
            value = [value]
    if isinstance(value, list) and list in kinds:
        elements = get_args(allowed[kinds.index(list)])
        return [fit_type(name, element, elements[0]) for element in value] if elements else value
    is_mapping_in_text = dict in kinds and isinstance(value, str) and value.lstrip().startswith("{")
    if type(value) in kinds and not is_mapping_in_text:
        return value
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(value, str):
            return _read_text(value, kinds)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if float in kinds else _as_integer(value, kinds)
    expected = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)
    remedy = "; put it in quotes" if str in kinds and not isinstance(value, str) else ""
    raise UsageError(f"{name}={value!r} must be {expected}{remedy}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean ...?)"` where one of the known names is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _choose(name: str, value: str, choices: type[Enum]) -> str:
    values = [str(member.value) for member in choices]
    if value not in values:
        hint = did_you_mean(value, values)
        raise UsageError(f"{name}={value!r} is unknown{hint}; choose one of {', '.join(values)}.")
    return value


def _read_text(text: str, kinds: list[Any]) -> Any:
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds and text.lower() in YES | NO:
        return text.lower() in YES
    if float in kinds:
        return float(text)
    if dict in kinds and isinstance(value := parse_yaml(text), dict):
        return value
    return _as_integer(text, kinds)


def _as_integer(value: Any, kinds: list[Any]) -> int:
    if int not in kinds:
        raise ValueError(value)
    with contextlib.suppress(ValueError):
        if isinstance(value, str):
            return int(value)
    if not float(value).is_integer():
        raise ValueError(value)
    return int(float(value))


def automatic_layers(value: Any) -> int:
    """Return K of `softmax_layers="auto:K"`, 0 for layers that are listed."""
    return parse_softmax_layers(value)[1] if isinstance(value, str) and value.startswith("auto") else 0


def parse_softmax_layers(value: str | Sequence[int] | None) -> tuple[list[int] | None, int]:
    """Return the layers that `softmax_layers` lists, and how many `"auto:K"` asks to choose.

    Raises:
        UsageError: For text that is neither.
    """
    if not isinstance(value, str):
        return None if value is None else list(value), 0
    name, _, count = value.partition(":")
    if name != "auto" or not count.isdecimal() or int(count) < 1:
        raise UsageError(f"softmax_layers={value!r}: pass layers, such as 0 11, or auto:K to choose K by measurement.")
    return None, int(count)
