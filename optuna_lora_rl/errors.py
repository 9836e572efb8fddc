"""The errors that a user can cause and mend, and what is left out of every message.

Messages quote what a file or a command says, and that may hold a password or be megabytes long.
So no message is made without :func:`masked` and :func:`shortened`: a ``UserError`` passes through
both when it is made, and the command line passes everything else through them.
"""

from __future__ import annotations

import errno
import re
import reprlib
from typing import Any

# Characters of a whole message, and of one value that is quoted in it.
MOST_SAID = 500
_MOST_QUOTED = 120
# Characters of a message that are looked at: nothing longer is shown.
_MOST_READ = 20_000

_SECRET_NAME = (
    r"(?:[\w-]*[_-])?(?:pass(?:word|wd|phrase|file)|passwd|pwd|secret|credentials?"
    r"|(?:api|access|private|secret|ssl|wandb)[_-]?key"
    r"|(?:hub|hf|auth|access|api|refresh|bearer|session|wandb)[_-]?token)(?:_id)?"
    r"|(?:ssl|db|database|user|my|pg)?(?:password|token)|sslkey"
)
# ``password=...``, ``'hub_token': '...'``, ``--token: ...``.
_NAMED = re.compile(
    rf"""(?ix) (?<![\w-])
    ((?:{_SECRET_NAME}) \\*['"]? (?:\s*[:=]\s*|\s(?:is|was)\s(?:now\s)?(?=['"])))
    ( \\*'[^'\n]{{0,1000}}'? | \\*"[^"\n]{{0,1000}}"? | [^\s,;&#'")\]}}]{{1,1000}} )"""
)
# What may be a user or a scheme, a colon, and all up to the last "@" of the word.
_START = r"""(?<![^\s'"(\[{=,])([^\s'"(\[{=,:]{0,200}:)"""
_USERINFO = re.compile(_START + r"(\S{1,1000})@")
# Within quotes a password may hold spaces.
_QUOTED_USERINFO = re.compile(r"""(?<=['"])([^\s'"(\[{=,:]{0,200}:)([^\s'"][^'"\n]{0,1000})@""")
# A password with spaces that is not quoted; what looks like a port is none.
_SPACED = re.compile(
    r"""(?<=://)([^\s/:@'"]{1,200}:)(?!\S*@|\d*(?:[/?\s'",.;:)\]}]|$))
    ((?:(?!://)[^'"\n]){1,200})@(?=[\w\[])""",
    re.VERBOSE,
)
# Where the host is missing, the password stands in place of the port.
_NO_PORT = re.compile(
    r"""(?<=://)([^\s/:@'"\[\]]+):(?!\*\*\*@|\d*[.,;:!]*(?:[\s/?'")\]}]|$))([^\s'"]{1,1000})"""
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/-]{8,}=*")
_TOKEN = re.compile(
    r"\b(hf_|api_org_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abpr]-|AKIA|wandb_v1_)[\w-]{12,}"
)

# What a machine or a network does to a run, whatever its configuration: errors of these kinds,
# numbers and packages.
_OUTSIDE_KINDS = (ImportError, ConnectionError, TimeoutError)
_OUTSIDE_NUMBERS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
_OUTSIDE_PACKAGES = {"socket", "requests", "urllib3", "httpx", "aiohttp", "sqlalchemy"}


def is_outside(error: BaseException) -> bool:
    """Whether an error has a cause outside the configuration that was run.

    A package that cannot be imported, a network that is lost, a disk that is full or broken. What
    an error was raised from counts as well.
    """
    cause: BaseException | None = error
    while cause is not None:
        packages = {kind.__module__.partition(".")[0] for kind in type(cause).__mro__}
        number = cause.errno if isinstance(cause, OSError) else None
        if isinstance(cause, _OUTSIDE_KINDS) or number in _OUTSIDE_NUMBERS:
            return True
        if packages & _OUTSIDE_PACKAGES:
            return True
        cause = cause.__cause__
    return False


class UserError(ValueError):
    """Bad input: one sentence that names the key, the value and what is allowed.

    The command line prints the sentence and exits with status 2; from Python it is an ordinary
    ``ValueError``. The sentence shows no credentials and has at most 500 characters.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(masked(shortened(sentence, _MOST_READ))))


def masked(text: str) -> str:
    """Returns a text with ``***`` in place of whatever looks like credentials.

    These are passwords in URLs, however odd the URL, values that are named ``password``,
    ``token`` and the like, and tokens that are known by their beginning.
    """
    if "@" in text:
        text = _QUOTED_USERINFO.sub(_without_password, text)
        text = _SPACED.sub(r"\1***@", text)
        text = _USERINFO.sub(_without_password, text)
    text = _NO_PORT.sub(r"\1:***", text)
    text = _NAMED.sub(_without_value, text)
    return _TOKEN.sub(r"\1***", _BEARER.sub(r"\1***", text))


def shortened(text: str, most: int = MOST_SAID) -> str:
    """Returns a text of at most ``most`` characters: what is too much is left out in the middle.

    A sentence names the key at its beginning and what is allowed at its end.
    """
    if len(text) <= most:
        return text
    head = (most - 5) * 3 // 5
    return f"{text[:head]} ... {text[len(text) - (most - 5 - head) :]}"


def quoted(value: Any) -> str:
    """Returns ``value`` as a message quotes it: like ``repr``, but short and without secrets."""
    return masked(_Quote().repr(value))


class _Quote(reprlib.Repr):
    """``repr`` of at most some hundred characters, which reads no more than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 8

    def repr(self, x: Any) -> str:
        return shortened(super().repr(x), _MOST_QUOTED)

    def repr_str(self, x: str, level: int) -> str:
        # Masked before it is cut, so that no half of a password is left.
        return repr(shortened(masked(x[:_MOST_READ]), _MOST_QUOTED))

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out thousands of digits.
        return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"


def _without_password(match: re.Match[str]) -> str:
    start, rest = match.groups()
    userinfo = rest.lstrip("/")
    if userinfo == rest:
        return f"{start}***@"
    user, colon, _ = userinfo.partition(":")
    if not colon or start.startswith("sqlite"):
        # A user alone, or the path of a file.
        return match[0]
    return f"{start}{rest[: len(rest) - len(userinfo)]}{user}:***@"


def _without_value(match: re.Match[str]) -> str:
    value = match[2].lstrip("\\")
    quote = value[0] if value[0] in "'\"" else ""
    return f"{match[1]}{quote}***{quote}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def not_installed(what: str, error: ModuleNotFoundError) -> str:
    """Return the sentence on a package that fine-tuning needs and the samplers do not.

    Args:
        what: What needs it, in words.
        error: What importing it raised.

    Raises:
        ModuleNotFoundError: The error itself, where it is a module of this package that is gone.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", __package__):
        raise error
    return f"{what} needs the package {package}: pip install 'optuna_lora_rl[finetune]'"
