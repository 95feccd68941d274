"""The exceptions that this project raises for mistakes that a user can put right.

Every message names the argument, its value and the way out, in one line. The command line prints the message alone
(the traceback with `--debug`) and exits with `exit_code`.
"""


class AdaLAError(Exception):
    """Base class: something failed while running (a full disk, no network, a broken file). Exit code 1."""

    exit_code = 1


class UsageError(AdaLAError, ValueError):
    """An argument, a config field or a combination of them is wrong. Exit code 2."""

    exit_code = 2


class DataError(AdaLAError):
    """A dataset is empty, unreadable, or holds too many broken images."""


class CheckpointError(AdaLAError):
    """A checkpoint could not be read or written whole."""
