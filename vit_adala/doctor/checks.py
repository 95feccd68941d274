"""Health checks for `vit-adala doctor` and other scripts: small functions that return a `Check`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from modeling_adala.errors import AdaLAError

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One line of a health report.

    Args:
        name (`str`): Name of the check.
        status (`str`): `"PASS"`, `"WARN"` (works, with a limitation) or `"FAIL"`.
        message (`str`): Finding, in one line.
        remedy (`str`, *optional*): What to do about it.
    """

    name: str
    status: Status
    message: str
    remedy: str = ""


def run_check(check: Callable[..., Check], *args: Any) -> Check:
    """Run a check. An exception in it becomes a FAIL, since the model may be broken in any way."""
    try:
        return check(*args)
    except AdaLAError as error:
        return Check(title(check), "FAIL", str(error))
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        remedy = "Please report it if the remedies of the other lines do not help."
        return Check(title(check), "FAIL", f"{type(error).__name__}: {reason}", remedy)


def title(check: Callable[..., Check]) -> str:
    """Return the name of a check, from that of its function."""
    return check.__name__.replace("_", " ")


__all__ = ["Check", "Status", "run_check", "title"]
