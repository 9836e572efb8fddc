"""The errors that a user can cause and mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: one sentence that names the key, the value and what is allowed.

    The command line prints the sentence and exits with status 2; from Python it is an ordinary
    ``ValueError``.
    """
