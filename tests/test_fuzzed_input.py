"""Whatever a file, an argument, a database or an adapter holds: a result or one short sentence.

``FUZZ_EXAMPLES=1500 pytest tests/test_fuzzed_input.py`` tries more: so many study files, and a
fifth as many arguments, databases and adapters each.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from optuna_lora_rl import cli
from optuna_lora_rl import errors
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import finetuner as trial_module
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import spec as study_spec
from tests.study.conftest import SMALL
from tests.study.conftest import PaperTuner
from tests.study.conftest import merged

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
SECONDS = 5

# A file that says something in every section.
FULL: dict[str, Any] = merged(
    SMALL,
    {
        "name": "small",
        "sampler": {"name": "rl", "seed": 1},
        "pruner": {"name": "median", "n_warmup_steps": 1},
        "budget": {"trials": 3, "hours": 1.0, "wall_hours": None, "cost": 5},
        "target_sets": {"mine": ["q_proj", "v_proj"]},
        "transfer_from": ["earlier", {"study": "another", "storage": "runs/another"}],
        "packing": 2,
        "storage": None,
        "output": "out",
        "data.columns": {"prompt": "question", "completion": "answer"},
        "data.seed": 3,
        "training.rank_change": {"patience": 2},
        "training.report_to": [],
        "objective.cost": {"time": 1.0, "memory": 0.5, "parameters": 0.5},
        "objective.objectives": ["score"],
        "space.lora_alpha": {"ratio": {"low": 0.5, "high": 4, "log": True}, "of": "lora_rank"},
        "space.lora_dropout": {"low": 0.0, "high": 0.3, "when": {"use_dora": [False]}},
    },
)
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, -(2**63), 0.0, -0.5, 1e308, 1e-320),
    *(float("inf"), float("nan"), "", " ", "tiny", "rl", "1e-4", "2 * lora_rank", "off", "auto"),
    *(
        "x" * 5000,
        "größe ✓ 你好 🎲",
        "a\nb",
        "<script>alert(1)</script>",
        "[bold]x[/]",
        "..",
        "/x",
    ),
    *("../../x", "-1", "*", "a:b@c", "postgresql://me:sEcr3t@h:port/x", "sqlite:///x?y", "{x}"),
    *([], {}, [None], [1, "a"], {"x": 1}, {"low": 1}, {"low": 1, "high": 2}, {"name": "rl"}),
    *([[]], {"a": {"b": {"c": []}}}, ["x"] * 50, {"choices": [1, 1]}, {"fixed": []}, "0x10"),
    *({"ratio": -1, "of": "lora_rank"}, {"ratio": 1, "of": "x"}, "%41", "~", "2024-13-45"),
]
MARKS = [
    *"{}[]&*!|>'\"%@`#,?:-\t\n",
    "\x00",
    "\x1b",
    "\ufeff",
    "\u2028",
    "<<: *a\n",
    "---\n",
    "9" * 50,
]

FUZZED = settings(
    deadline=None,
    database=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
seeds = st.integers(0, 2**32)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The places of all values in nested mappings and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in list(inner):
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from places(one, (*path, key))


def changed(content: Any, rng: random.Random) -> Any:
    """``content`` with a value replaced, or a key removed, renamed or added."""
    content = json.loads(json.dumps(content))
    every = list(places(content))
    *path, last = rng.choice(every)
    holder = content
    for key in path:
        holder = holder[key]
    junk = rng.choice(JUNK)
    way = rng.choice(["replace", "replace", "replace", "remove", "rename", "add", "nest", "swap"])
    if way == "remove":
        del holder[last]
    elif way == "rename" and isinstance(holder, dict):
        holder[rng.choice(["", "int", "[x", "name", "naem", "X" * 300, last.upper()])] = (
            holder.pop(last)
        )
    elif way == "add" and isinstance(holder, dict):
        holder[rng.choice(["name", "extra", "seed", "lora_rank", "low", "study"])] = junk
    elif way == "nest":
        holder[last] = {rng.choice(["name", "trials", "a"]): holder[last]}
    elif way == "swap":
        *other, key = rng.choice(every)
        source: Any = content
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for part in other:
                source = source[part]
            holder[last] = json.loads(json.dumps(source[key]))
    else:
        holder[last] = junk
    return content


def scribbled(text: str, rng: random.Random) -> str:
    """``text`` with a few characters or lines put in, taken out or repeated."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(text))
        way = rng.randint(0, 3)
        if way == 0:
            text = text[:at] + rng.choice(MARKS) + text[at:]
        elif way == 1:
            text = text[:at] + text[at + rng.randint(1, 30) :]
        else:
            lines = text.splitlines(keepends=True) or ["\n"]
            k = rng.randrange(len(lines))
            lines[k : k + 1] = [lines[k]] * 2 if way == 2 else []
            text = "".join(lines)
    return text


def ended(arguments: list[str]) -> tuple[int, str]:
    """The exit status and what went to stderr, after checking both."""
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(arguments)
        except SystemExit as ending:
            code = int(ending.code or 0)
    said = err.getvalue()
    assert code in (0, 1, 2), (arguments, code, said)
    assert "Traceback" not in said, (arguments, said)
    assert "sEcr3t" not in said + out.getvalue(), (arguments, said)
    if said.startswith("error: "):
        assert len(said) <= errors.MOST_SAID + len("error: \n"), (arguments, said)
    assert time.process_time() - began < SECONDS, (arguments, said)
    return code, said


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    PaperTuner.failures = []
    monkeypatch.setattr(trial_module, "FineTuner", PaperTuner)
    return tmp_path


@settings(FUZZED, max_examples=EXAMPLES * 2)
@given(seed=seeds)
def test_a_fuzzed_study_file(seed: int) -> None:
    rng = random.Random(seed)
    content: Any = FULL
    for _ in range(rng.randint(0, 3)):
        content = changed(content, rng)
    text = yaml.safe_dump(content, allow_unicode=True, default_flow_style=rng.choice([None, True]))
    if rng.random() < 0.4:
        text = scribbled(text, rng)
    Path("small.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    if seed % 10 == 0:
        assert ended(["validate", "small.yaml"])[0] in (0, 2)
        return
    began = time.process_time()
    try:
        study_spec.load("small.yaml")
    except UserError as error:
        assert 0 < len(str(error)) <= errors.MOST_SAID
        assert "sEcr3t" not in str(error)
    assert time.process_time() - began < SECONDS


WORDS = [
    *(
        "",
        "-",
        "--",
        "-1",
        "0",
        "1",
        "9" * 30,
        "nan",
        "1e999",
        "a" * 3000,
        "x.yaml",
        "GOOD",
        "BAD",
    ),
    *("FOLDER", "/dev/null", "/proc/none/x", "\x1b[31m", "größe 你好", "{}", "[]", "[/x]", "a=b"),
    *("postgresql://me:sEcr3t@h:port/x", "sqlite:///FOLDER", "me:sEcr3t@h", "nobody/nothing"),
    *(
        '{"trial": 0}',
        '{"trial": 0, "value": NaN}',
        '{"trial": -1, "state": "fail"}',
        "../..",
        "~x",
    ),
    *("budget.trials=-1", "space=[1", "a.b.c=1", "=", "x" * 300 + "=1", "rl,tpe", ",", "q_proj"),
]
OPTIONS: dict[str, list[str]] = {
    "init": ["--model", "--train", "--trials"],
    "validate": ["--set"],
    "run": ["--set", "--plain"],
    "status": ["--set"],
    "best": ["--set", "--json"],
    "report": ["--trial", "--set"],
    "ask": ["--count", "--set"],
    "tell": ["--set"],
    "export": ["--output", "--to", "--trial", "--set"],
    "explain": ["--trial", "--set"],
    "dashboard": ["--host", "--port", "--set"],
    "compare": ["--output", "--samplers", "--seeds", "--workers", "--set"],
    "train-policy": ["--output", "--minutes", "--processes", "--set"],
    "learn": ["--storage", "--study", "--output", "--seed", "--weights", "--processes"],
    "analyze": ["--model", "--adapter", "--modules", "--csv", "--figure", "--dtype"],
    "advise": ["--model", "--task-complexity", "--memory-gb", "--modules", "--batch-size"],
    "truncate": ["--energy", "--rank", "--study", "--output"],
    "merge": ["--output", "--model"],
}
# With a good file these would work, for long.
WORKING = {"run", "dashboard", "compare", "train-policy", "learn"}


@settings(FUZZED, max_examples=max(EXAMPLES // 5, 40))
@given(seed=seeds)
def test_fuzzed_arguments(seed: int) -> None:
    rng = random.Random(seed)
    Path("good.yaml").write_text(yaml.safe_dump(merged(SMALL, {"output": "out"})))
    Path("bad.yaml").write_text("data: [\n")
    Path("folder").mkdir(exist_ok=True)
    command = rng.choice(list(OPTIONS))
    files = {"GOOD": "bad.yaml" if command in WORKING else "good.yaml", "BAD": "bad.yaml"}
    arguments = [command]
    if rng.random() < 0.9:
        arguments.append(rng.choice(["GOOD", "GOOD", "GOOD", *WORDS]))
    for _ in range(rng.randint(0, 4)):
        arguments += [rng.choice([*OPTIONS[command], rng.choice(WORDS)]), rng.choice(WORDS)]
    ended([files.get(word, word).replace("FOLDER", "folder") for word in arguments])


@pytest.fixture
def database(folder: Path) -> Path:
    """The database of a study with results of all kinds, in a folder of its own."""
    (folder / "good.yaml").write_text(yaml.safe_dump(merged(SMALL, {"output": "out"})))
    PaperTuner.failures = [None, RuntimeError("no such kernel")]
    runner.run(study_spec.load("good.yaml"))
    return Path(shutil.copy(folder / "out" / "study.db", folder / "kept.db"))


def damaged(content: bytes, rng: random.Random) -> bytes:
    way = rng.randint(0, 4)
    at = rng.randrange(len(content))
    if way == 0:
        return content[:at]
    if way == 1:
        return rng.randbytes(rng.randint(0, 5000))
    if way == 2:
        return content[:at] + rng.randbytes(rng.randint(1, 2000)) + content[at + 2000 :]
    if way == 3:
        return rng.choice([b"", b"SQLite format 3\x00", b"{}", b"\x00" * 4096, b"not a database"])
    return content[:at] + bytes(rng.randint(1, 500)) + content[at:]


def rewritten(file: Path, rng: random.Random) -> None:
    """Takes rows or tables out of a database, or puts junk into them."""
    connection = sqlite3.connect(file)
    names = connection.execute("select name from sqlite_master where type = 'table'").fetchall()
    table = rng.choice([name for (name,) in names])
    columns = [row[1] for row in connection.execute(f"pragma table_info({table})")]
    column, junk = (
        rng.choice(columns),
        rng.choice(["x", "{", "[1]", "-1", "", 10**9, None, b"\xff"]),
    )
    with contextlib.suppress(sqlite3.Error):
        match rng.randint(0, 4):
            case 0:
                connection.execute(f"drop table {table}")
            case 1:
                connection.execute(f"delete from {table} where rowid % ? = 0", [rng.randint(1, 3)])
            case 2:
                connection.execute(f"alter table {table} drop column {column}")
            case 3:
                connection.execute(f"alter table {table} rename to other")
            case _:
                connection.execute(f"update {table} set {column} = ?", [junk])
    connection.commit()
    connection.close()


LOOKS = [
    *(["status"], ["best"], ["best", "--json"], ["report"], ["explain"], ["ask"], ["validate"]),
    *(["report", "--trial", "1"], ["export", "--output", "exported"], ["run"]),
]


@settings(FUZZED, max_examples=max(EXAMPLES // 5, 40))
@given(seed=seeds)
def test_a_fuzzed_database(database: Path, seed: int) -> None:
    rng = random.Random(seed)
    file = Path("out/study.db")
    shutil.copy(database, file)
    if rng.random() < 0.5:
        file.write_bytes(damaged(database.read_bytes(), rng))
    else:
        rewritten(file, rng)
    command, *rest = rng.choice(LOOKS)
    shutil.rmtree("exported", ignore_errors=True)
    ended([command, "good.yaml", *rest])
    tell = json.dumps({"trial": rng.randint(0, 4), "value": 1})
    ended(["tell", "good.yaml", tell])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on two layers, as PEFT saves it."""
    import torch
    from safetensors.torch import save_file

    target = tmp_path_factory.mktemp("adapter")
    tensors = {
        f"base_model.model.model.layers.0.self_attn.{module}.lora_{side}.weight": torch.randn(
            shape
        )
        for module in ("q_proj", "v_proj")
        for side, shape in (("A", (4, 16)), ("B", (16, 4)))
    }
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "./missing",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_parameters": None,
    }
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@settings(FUZZED, max_examples=max(EXAMPLES // 5, 40))
@given(seed=seeds)
def test_a_fuzzed_adapter(adapter: Path, seed: int) -> None:
    rng = random.Random(seed)
    own = Path("adapter")
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(adapter, own)
    file = own / rng.choice(["adapter_config.json", "adapter_model.safetensors"])
    way = rng.randint(0, 3)
    if way == 0 or file.suffix == ".safetensors":
        file.write_bytes(damaged(file.read_bytes(), rng))
    elif way == 1:
        file.unlink()
        file.mkdir()
    else:
        config = changed(json.loads(file.read_text()), rng)
        file.write_text(json.dumps(rng.choice([config, config, config, *JUNK[-6:], "[" * 10_000])))
    commands: list[Callable[[], list[str]]] = [
        lambda: ["truncate", "adapter"],
        lambda: ["truncate", "adapter", "--energy", "0.9", "--output", "cut"],
        lambda: ["truncate", "adapter", "--rank", "2", "--output", "cut"],
        lambda: ["analyze", "--adapter", "adapter"],
        lambda: ["merge", "adapter", "--output", "whole"],
    ]
    ended(rng.choice(commands)())
