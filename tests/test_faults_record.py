"""The list of faults names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "studies" / "results" / "faults.md"


def test_every_test_that_the_list_of_faults_names_exists() -> None:
    named, lost = 0, []
    for line in RECORD.read_text(encoding="utf-8").splitlines():
        file = ""
        for path, name in re.findall(r"(tests/[\w/]+\.py)?(?:::(\w+))?", line):
            file = path or file
            if not (path or name) or not file:
                continue
            named += 1
            there = _tests(ROOT / file) if (ROOT / file).is_file() else set()
            if not there or (name and name not in there):
                lost.append(f"{file}::{name}")
    assert lost == [] and named > 100


def _tests(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
