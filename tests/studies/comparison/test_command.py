"""A comparison's file: what is wrong in it, and the page that says how to write one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.terminal import console
from studies.comparison import command

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "comparing.md"
COMPARISONS = {
    "no such sampler": (
        "samplers.gp.name",
        "gpp",
        "samplers.gp.name is 'gpp', but must be one of",
    ),
    "no such option": ("samplers.gp.speed", "1", "sampler 'gp' has no option 'speed'"),
    "no such start": ("samplers.gp.start", "well", "samplers.gp.start is 'well'"),
    "no such family": (
        "problems.mixd",
        "{}",
        "mixd is not a known key; did you mean mixed",
    ),
    "no such function": ("problems.functions.families", "[cube]", "is 'cube', but must be"),
    "no family": ("problems", "{}", "problems names no family, but must have some of"),
    "no such reference": ("reference", "tpe", "reference is 'tpe', but must be one of gp"),
    "no trials": ("trials", "0", "trials is 0, but must be at least 1"),
}
IMPORTS = {
    "no path": ("samplers.gp.import", "gp", "must be a module and a name, such as"),
    "no module": ("samplers.gp.import", "nowhere:Mine", "the module 'nowhere' cannot be imported"),
    "no name": ("samplers.gp.import", "math:Mine", "the module 'math' has no 'Mine'"),
    "no sampler": ("samplers.gp.import", "pathlib:Path", "gives no Optuna sampler"),
    "an option too many": (
        "samplers.gp",
        "{import: 'optuna.samplers:RandomSampler', speed: 1}",
        "sampler 'gp' cannot be made",
    ),
    "no problem": ("problems.import", "['math:pi']", "gives neither a Problem nor a list"),
}


@pytest.mark.parametrize("case", COMPARISONS | IMPORTS)
def test_mistakes_in_a_comparison(case: str, tmp_path: Path) -> None:
    key, value, sentence = (COMPARISONS | IMPORTS)[case]
    text = "samplers: {gp: {}}\nproblems: {functions: {families: [sphere], dimensions: [2]}}\n"
    file = tmp_path / "comparison.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        command.from_file(file, None, tmp_path, [f"{key}={value}"], console())
    assert sentence in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_only_samplers_of_the_file_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "comparison.yaml"
    file.write_text("samplers: {gp: {}}\nproblems: {networks: {}}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--samplers: 'tpe' is not in .*; use some of gp"):
        command.from_file(file, ["tpe"], tmp_path, [], console())


def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    """What the page shows, written to the files that it names and run by its command."""
    page = PAGE.read_text(encoding="utf-8")
    for name, content in re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (typed,) = re.findall(r"^    python (-m studies\.comparison .*)$", page, re.MULTILINE)
    ran = subprocess.run(
        [sys.executable, *typed.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found = (tmp_path / "runs" / "mine" / "comparison.md").read_text(encoding="utf-8")
    assert "`halves`" in found and "`random`" in found
    records = (tmp_path / "runs" / "mine" / "records.jsonl").read_text(encoding="utf-8")
    assert records.count('"problem": "bowl"') == 3 * 3


def test_a_mistake_is_one_sentence_and_status_two(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("samplers: {}\nproblems: {}\n", encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-m", "studies.comparison", str(tmp_path / "empty.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert "error: " in ran.stderr and "Traceback" not in ran.stderr
