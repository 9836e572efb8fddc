"""Which file may import which: the floors of docs/architecture.md, read from the imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import optuna_lora_rl

PACKAGE = Path(optuna_lora_rl.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
# From the top down. A room imports from itself and from what stands below it.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("study",),
    ("samplers", "learning", "finetuning"),
    ("pruners", "policy", "rank", "real", "tiny", "space"),
    ("space_forms",),
    ("vocabulary", "by_name"),
    ("activity", "errors", "terminal", "user_cache"),
)
# What a room may not import, whoever wrote it.
NEVER = {
    "policy": ("optuna", "transformers", "trl", "peft"),
    "rank": ("optuna",),
    "finetuning": ("optuna", "optuna_lora_rl.policy", "optuna_lora_rl.samplers"),
    "samplers": ("transformers", "trl", "peft", "optuna_lora_rl.finetuning"),
    "pruners": ("transformers", "trl", "peft", "optuna_lora_rl.finetuning"),
}
FILES = {
    ".".join(("optuna_lora_rl", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): file
    for file in PACKAGE.rglob("*.py")
}
# The face of the package, which loads what it names on first use.
FACE = "optuna_lora_rl"


def imports(file: Path, *, with_types: bool = True) -> Iterator[str]:
    """What a file imports, anywhere in it; names of modules, where a name is one."""
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            if not with_types:
                continue
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else str(node.module)
        pending += ast.iter_child_nodes(node)


def room_of(module: str) -> str:
    return module.split(".")[1]


def floor_of(room: str) -> int:
    (floor,) = (number for number, rooms in enumerate(FLOORS) if room in rooms)
    return floor


@pytest.mark.parametrize("module", sorted(FILES.keys() - {FACE}))
def test_imports_go_downwards(module: str) -> None:
    room = room_of(module)
    for name in imports(FILES[module]):
        for other in NEVER.get(room, ()):
            assert name != other and not name.startswith(f"{other}."), f"{module}: {name}"
        if name not in FILES or name == FACE or room_of(name) == room:
            continue
        assert room_of(name) != "cli" or room == "__main__", f"{module}: {name}"
        above, below = floor_of(room), floor_of(room_of(name))
        assert above < below, f"{module} imports {name}, which is not below it"


def test_no_files_import_each_other() -> None:
    """In a circle neither can be read, tested or replaced without the other."""
    graph = {
        module: {name for name in imports(file, with_types=False) if name in FILES} - {module}
        for module, file in FILES.items()
    }
    # Whoever imports nothing that is left is taken out, until those are left that go round.
    while free := {module for module, needs in graph.items() if not needs}:
        graph = {m: needs - free for m, needs in graph.items() if m not in free}
    graph = {m: needs & graph.keys() for m, needs in graph.items()}
    assert not graph, f"these import each other, or what does: {sorted(graph)}"


def test_the_page_has_every_room() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rooms = {room for floor in FLOORS for room in floor}
    assert {
        room for room in rooms if not re.search(rf"^\|.*`{room}[./]", page, re.MULTILINE)
    } == set()
