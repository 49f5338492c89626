"""Errors a user can cause and mend."""

from __future__ import annotations


class UserError(Exception):
    """One paragraph for the user: the value that is wrong, and the remedy. The command line prints it without a traceback."""
