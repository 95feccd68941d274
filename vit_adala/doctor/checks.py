"""The form of a health check, for `vit-adala doctor` and for any script: a small function that returns a `Check`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from modeling_adala.errors import AdaLAError

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One line of a health report.

    Args:
        name (`str`): What was looked at.
        status (`str`): `"PASS"`, `"WARN"` (works, but should be known) or `"FAIL"`.
        message (`str`): What was found, in one line.
        remedy (`str`, *optional*): What to do about it. Default: nothing.
    """

    name: str
    status: Status
    message: str
    remedy: str = ""


def run_check(check: Callable[..., Check], *args: Any) -> Check:
    """Runs a check. An error inside it is its finding, since what is to be examined may be broken in any way."""
    try:
        return check(*args)
    except AdaLAError as error:
        return Check(title(check), "FAIL", str(error))
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        remedy = "Please report it if the remedies of the other lines do not help."
        return Check(title(check), "FAIL", f"{type(error).__name__}: {reason}", remedy)


def title(check: Callable[..., Check]) -> str:
    """The name of a check, from that of its function."""
    return check.__name__.replace("_", " ")


__all__ = ["Check", "Status", "run_check", "title"]
