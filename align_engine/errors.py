"""The errors a user can cause or must know about; the command line prints them without a traceback."""

from __future__ import annotations


class AlignError(Exception):
    """A message for the user. `exit_code` is what the `align` command returns."""

    exit_code = 1


class BadInput(AlignError, ValueError):
    """A recipe, flag, file or folder that cannot be used; found before anything is computed."""

    exit_code = 2


class RunFailed(AlignError, RuntimeError):
    """A run that began and cannot go on; its last checkpoint is whole."""
