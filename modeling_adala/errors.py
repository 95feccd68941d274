"""Exceptions for mistakes that a user can put right.

Every message names the argument, its value and the way out, in one line. The command line prints the message alone
(the traceback with `--debug`) and exits with `exit_code`.
"""


class AdaLAError(Exception):
    """Base class; raised for failures while running: a full disk, no network, a broken file. Exit code 1."""

    exit_code = 1


class UsageError(AdaLAError, ValueError):
    """Raised for a wrong argument, config field or combination of them. Exit code 2."""

    exit_code = 2


class DataError(AdaLAError):
    """Raised for a dataset that is empty, unreadable, or holds too many broken images."""


class CheckpointError(AdaLAError):
    """Raised for a checkpoint that could not be read or written whole."""
