# Fixtures are imported by name and then asked for by name.
# ruff: noqa: F811

"""The command line as a person meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import psutil
import pytest

from optuna_lora_rl import cli
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import spec as study_spec
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner
from tests.study.conftest import make_spec  # noqa: F401
from tests.study.conftest import paper  # noqa: F401
from tests.study.conftest import study_file  # noqa: F401

COMMANDS = ["init", "validate", "run", "status", "best", "ask", "tell", "export", "dashboard"]
COMMANDS += ["explain", "report", "compare", "train-policy"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "optuna_lora_rl", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )


def output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_and_how_to_begin() -> None:
    said = command("--help")
    assert said.returncode == 0 and "optuna-lora-rl init study.yaml" in said.stdout
    assert all(name in said.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_by_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"Example: optuna-lora-rl {name} " in output([name, "--help"], capsys)


def test_help_and_validate_load_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; from optuna_lora_rl import cli\n"
        "for arguments in (['init', 'a.yaml'], ['validate', 'a.yaml', '--set', 'sampler=tpe']):\n"
        "    try: cli.main(arguments)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'transformers', 'trl', 'peft', 'datasets', 'pandas', 'plotly'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = str(Path(__file__).parents[1])
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert said.stdout.splitlines()[-1:] == ["[]"], said.stderr


def test_run_status_best_and_export(
    paper: type[PaperTuner],
    make_spec: MakeSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_spec()
    file = str(tmp_path / "small.yaml")
    assert "Finished: 3 of 3 trials" in output(["run", file], capsys)
    assert "3 of 3 trials (3 completed)" in output(["status", file], capsys)
    best = json.loads(output(["best", file, "--json"], capsys))
    assert best["configuration"]["max_steps"] == 4 and best["untuned"]["loss"] == 2.0
    shown = output(["best", file], capsys)
    assert "learning_rate" in shown and f"{best['score']:.4f}" in shown
    exported = tmp_path / "adapter"
    assert "wrote the adapter" in output(["export", file, "-o", str(exported)], capsys)
    assert (exported / "adapter_config.json").exists()
    asked = json.loads(output(["ask", file], capsys))
    told = json.dumps({"trial": asked["trial"], "value": 99})
    assert json.loads(output(["tell", file, told], capsys))["state"] == "COMPLETE"
    assert json.loads(output(["best", file, "--json"], capsys))["score"] == 99


def test_a_study_that_cannot_work_ends_with_status_1(
    paper: type[PaperTuner],
    make_spec: MakeSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_spec()
    paper.failures = [RuntimeError("no such kernel")] * 9
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(tmp_path / "small.yaml"), "--set", "budget.trials=9"])
    printed = capsys.readouterr()
    assert ended.value.code == 1, printed
    assert "all failed the same way: RuntimeError: no such kernel" in printed.out


@pytest.fixture
def begun(paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path) -> Path:
    """The file of a study that has begun."""
    pytest.importorskip("optuna_dashboard")
    runner.run(make_spec({"budget": 1}))
    return tmp_path / "small.yaml"


def test_the_dashboard_serves_the_study_and_no_argument_shows_its_storage(begun: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "optuna_lora_rl", "dashboard", str(begun), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        # Tests that a shell runs in the background hand down that it is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        (url,) = re.findall(r"http://[\d.:]+/", process.stdout.readline())
        with urllib.request.urlopen(f"{url}api/studies") as answer:
            assert json.load(answer)["study_summaries"][0]["study_name"] == "small"
        own = psutil.Process(process.pid)
        seen = [" ".join(one.cmdline()) for one in (own, *own.children(recursive=True))]
        assert not any("sqlite:" in line for line in seen), seen
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_a_dashboard_that_cannot_listen_is_one_sentence(begun: Path, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = command("dashboard", str(begun), "--host", host, "--port", str(port))
    assert said.returncode == 2
    assert re.fullmatch(
        rf"error: the dashboard cannot listen on {host}, port {port} \([^()]+\); give another with"
        r" --host and --port\n",
        said.stderr,
    ), said.stderr


def test_init_then_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    output(["init", str(file), "--trials", "7"], capsys)
    assert study_spec.load(file).budget.trials == 7
    assert "The file is valid." in output(["validate", str(file)], capsys)
    output(["init", str(file), "--force"], capsys)


def test_the_quickstart_comes_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = Path(__file__).parents[1] / "studies" / "quickstart.yaml"
    monkeypatch.chdir(tmp_path)
    assert study_spec.load("quickstart") == study_spec.load(clone)
    # A file of that name is the user's own.
    (tmp_path / "quickstart").write_text("model: tiny\ndata: tiny:sums-small\n")
    assert study_spec.load("quickstart").data.train == "tiny:sums-small"


@pytest.mark.parametrize(
    ("missing", "code", "what"),
    [
        ("typer", "from optuna_lora_rl.__main__ import main; main()", "the command line"),
        ("pydantic", "from optuna_lora_rl import tune", "tune"),
    ],
)
def test_what_needs_more_packages_says_how_they_are_installed(
    missing: str, code: str, what: str
) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; {code}"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    sentence = f"{what} needs the package {missing}: pip install 'optuna_lora_rl[finetune]'"
    assert ran.returncode != 0 and ran.stderr.strip().endswith(sentence)
