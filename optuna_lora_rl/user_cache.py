"""Where things are kept for a user rather than for a study."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """Returns ``$XDG_CACHE_HOME/optuna_lora_rl/<name>``, by default under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "optuna_lora_rl" / name
