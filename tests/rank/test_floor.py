"""What the rank floor may stand on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from optuna_lora_rl import rank

ROOMS = sorted(Path(rank.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.stem)
def test_imports_go_downwards(room: Path) -> None:
    tree = ast.parse(room.read_text(encoding="utf-8"))
    named = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    own = {name for name in named if name.startswith("optuna_lora_rl.")}
    allowed = ("optuna_lora_rl.rank", "optuna_lora_rl.errors", "optuna_lora_rl.activity")
    assert all(name.startswith(allowed) for name in own)
    assert not any(name.split(".")[0] == "optuna" for name in named)
