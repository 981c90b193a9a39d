"""`TacoError` and its kinds: what a user can mend, and work that was stopped from outside."""

from __future__ import annotations


class TacoError(Exception):
    """A problem the user can mend: a bad argument, file, model or budget.

    The command line prints its message as one line and exits with code 2; it never shows a traceback for it.
    """


class UnsupportedModelError(TacoError):
    """The model's structure is not one that layers can be taken out of; the message says what was found."""


class StoppedError(TacoError):
    """Work stopped for a reason outside of it; what was finished before is kept."""


class DiskFullError(StoppedError):
    """There is no space left."""


class LostProcessError(StoppedError):
    """Another process of the same run is gone, or did not answer in time."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a sentence about it; the name of its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
