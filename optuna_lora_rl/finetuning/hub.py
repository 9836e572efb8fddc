"""The Hugging Face hub: no waiting where it cannot be reached, and its errors in words."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager

_TIMEOUT_SECONDS = 5
_OFFLINE = ("offline", "connect", "resolve", "timeout", "maxretry")
_MISSING = ("RepositoryNotFound", "DatasetNotFound", "404", "is not a valid model")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Puts the libraries into offline mode, for the block, where the hub cannot be reached.

    They then take what is in their cache, or fail at once instead of after a minute of retries.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _is_reachable(constants.ENDPOINT):
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = False, before


def failure(kind: str, name: str, error: Exception) -> str:
    """Says in one sentence why something could not be had from the hub.

    Args:
        kind: ``"model"`` or ``"data set"``.
        name: What was asked for.
        error: What huggingface_hub, datasets or transformers raised.
    """
    chain = " ".join(f"{type(link).__name__} {link}" for link in _chain(error))
    if "GatedRepo" in chain or "gated repo" in chain:
        return f"the {kind} {name!r} is gated; accept its terms on the hub, then hf auth login"
    missing = any(word in chain for word in _MISSING)
    if any(word in chain.lower() for word in _OFFLINE) and not missing:
        return (
            f"{name!r} is no local file or folder, and the {kind} cannot be fetched from the hub: "
            "there is no connection"
        )
    if missing:
        return f"there is no {kind} {name!r}, neither here nor on the hub"
    return f"the {kind} {name!r} cannot be loaded: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_reachable(endpoint: str) -> bool:
    url = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies():
        # Behind a proxy only the libraries' own clients can tell.
        return True
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), _TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
