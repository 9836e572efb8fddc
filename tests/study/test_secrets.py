"""No password and no token in what is printed, stored or listed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from optuna_lora_rl import cli
from optuna_lora_rl import errors
from optuna_lora_rl.commands import study as study_commands
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import asking
from optuna_lora_rl.study import comparison
from optuna_lora_rl.study import opening
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import output
from optuna_lora_rl.study import report
from optuna_lora_rl.study import runner
from tests.study.conftest import SMALL
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner
from tests.study.conftest import merged

SECRET = "sEcr3t"

# What people write as a storage, and what may be said of it.
ADDRESSES = {
    "plain": (f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/x", "me:***@127.0.0.1:1/x"),
    "a user with an @": (f"postgresql+psycopg://me@corp.com:{SECRET}@127.0.0.1:1/x", "me@corp"),
    "an @ in the password": (f"postgresql+psycopg://me:a@{SECRET}@127.0.0.1:1/x", "me:***@127."),
    "a slash in the password": (f"postgresql+psycopg://me:a/{SECRET}@127.0.0.1:1/x", "me:***@"),
    "a question in the password": (f"postgresql+psycopg://me:a?{SECRET}@127.0.0.1:1/x", "me:***"),
    "a space in the password": (f"postgresql+psycopg://me:a {SECRET}@127.0.0.1:1/x", "me:***@"),
    "a colon in the password": (f"postgresql+psycopg://me:a:{SECRET}@127.0.0.1:1/x", "me:***@"),
    "a quote in the password": (f"postgresql+psycopg://me:a'{SECRET}@127.0.0.1:1/x", "me:***@"),
    "no scheme": (f"me:{SECRET}@127.0.0.1/x", "me:***@127.0.0.1/x"),
    "no scheme, but slashes": (f"//me:{SECRET}@127.0.0.1/x", "me:***@127.0.0.1/x"),
    "a scheme without its colon": (f"postgresql//me:{SECRET}@127.0.0.1/x", "me:***@127.0.0.1/x"),
    "one slash": (f"postgresql:/me:{SECRET}@127.0.0.1/x", "***@127.0.0.1/x"),
    "no host": (f"postgresql+psycopg://me:{SECRET}", "me:***"),
    "a bad port": (f"postgresql+psycopg://me:{SECRET}@127.0.0.1:port/x", "port"),
    "another database": (f"mysql://me:{SECRET}@127.0.0.1:1/x", "me:***@127.0.0.1:1/x"),
    "an unknown database": (f"nosuch://me:{SECRET}@127.0.0.1:1/x", "me:***@127.0.0.1:1/x"),
    "?password=": (f"postgresql+psycopg://me@127.0.0.1:1/x?password={SECRET}", "127.0.0.1:1/x"),
    "?sslkey=": (f"postgresql+psycopg://me@127.0.0.1:1/x?sslkey={SECRET}", "127.0.0.1:1/x"),
    "?passfile=": (f"postgresql+psycopg://me@127.0.0.1:1/x?passfile={SECRET}", "127.0.0.1:1/x"),
    "?token=": (f"postgresql+psycopg://me@127.0.0.1:1/x?token={SECRET}", "127.0.0.1:1/x"),
    "a list": ([f"postgresql://me:{SECRET}@127.0.0.1/x"], "storage is a list, but must be text"),
    "a list of words": (["postgresql", "me", SECRET], "storage is a list, but must be text"),
    "a mapping": ({"host": "h", "user": "me", "pw": SECRET}, "storage is a mapping, but must be"),
}

# Other texts that a message may quote.
TEXTS = [
    f"password={SECRET}",
    f"connect with host=h user=me password={SECRET} dbname=x",
    f"{{'user': 'me', 'password': '{SECRET}'}}",
    json.dumps({"hub_token": SECRET}),
    json.dumps(json.dumps({"password": SECRET})),
    f"training.extra.hub_token was '{SECRET}' and is now gone",
    f"PGPASSWORD={SECRET} psql",
    f"WANDB_API_KEY={SECRET}",
    f"aws_secret_access_key: {SECRET}",
    f"Authorization: Bearer {SECRET}{SECRET}",
    f"401 Unauthorized for hf_{SECRET}abcdefghijklmnop",
    f"https://hf_{SECRET}abcdefghijklmnop@hub.example/model",
    f"ghp_{SECRET}abcdefghijklmnopqrstuvwxyz",
    f"redis://:{SECRET}@host:6379/0",
    f"['postgresql://me:with a space {SECRET}@host/name', 'other']",
]

HARMLESS = [
    "sqlite:///runs/dates/study.db",
    "sqlite:////home/me@work/a:b@c/study.db",
    "postgresql://me@host:5432/name",
    "listening on http://127.0.0.1:8080/ until Ctrl-C",
    "http://[::1]:5432/x, http://host:8080.",
    "the tokenizer of 'x' has no eos_token: '</s>'",
    "line 3: the key data is given twice",
    "trial 3: 5 of 6; organisation/model@main",
]


@pytest.mark.parametrize("case", ADDRESSES)
def test_a_storage_is_named_without_its_password(
    case: str, study_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    storage, shown = ADDRESSES[case]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(study_file({"storage": storage})), "--plain"])
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert ended.value.code == 2 and printed.err.startswith("error: "), said
    assert SECRET not in said and shown in said
    assert len(printed.err.splitlines()) == 1 and len(printed.err) <= 510


@pytest.mark.parametrize("case", ADDRESSES)
@pytest.mark.parametrize("form", ["--set storage={}", "--set storage {}", "--set name.x={}", "{}"])
def test_no_password_is_repeated_from_the_command_line(
    form: str,
    case: str,
    study_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, _, rest = form.partition(" ")
    words = [first, rest] if rest else [first]
    value = ADDRESSES[case][0]
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    if not isinstance(value, str) and form != "--set storage={}":
        pytest.skip("a list on the command line is text unless it is a value")
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(study_file()), *(word.format(text) for word in words)])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert SECRET not in (printed.out + printed.err).replace("\n", "")


@pytest.mark.parametrize("text", TEXTS)
def test_credentials_are_masked_by_their_looks(text: str) -> None:
    assert SECRET not in errors.masked(text) and "***" in errors.masked(text)
    assert SECRET not in str(UserError(f"key is {text!r}, but must be a number"))
    assert SECRET not in errors.quoted(text) and SECRET not in errors.quoted({"key": [text]})


@pytest.mark.parametrize("text", HARMLESS)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert errors.masked(text) == text


@pytest.mark.parametrize("piece", ["a://", "a:", "password", "'", "@", ":@", "://:", "a-", "hf_"])
def test_long_texts_are_read_in_no_time(piece: str) -> None:
    began = time.perf_counter()
    said = str(UserError(piece * 1_000_000 + "@"))
    assert len(said) <= errors.MOST_SAID and time.perf_counter() - began < 2


def test_a_bug_is_a_traceback_without_passwords(
    study_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        try:
            raise KeyError(f"hub_token: {SECRET}")
        except KeyError as error:
            raise RuntimeError(f"no answer from https://me:{SECRET}@host/x") from error

    monkeypatch.setattr(study_commands, "load", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", str(study_file())])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and SECRET not in said
    assert "Traceback (most recent call last)" in said and "in fail" in said
    assert said.endswith("RuntimeError: no answer from https://me:***@host/x\n")


def test_why_a_trial_failed_is_stored_and_shown_without_passwords(
    paper: type[PaperTuner], make_spec: MakeSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec({"budget": 2})
    paper.failures = [OSError(f"401 for https://me:{SECRET}@host/x, token={SECRET}"), None]
    study = runner.run(spec).study
    assert SECRET not in (spec.folder / "study.db").read_bytes().decode("latin-1")
    assert SECRET not in report.write(study, spec).read_text(encoding="utf-8")
    assert "me:***@host" in study.trials[0].user_attrs[outcome.MESSAGE]


def test_a_reason_that_is_told_is_stored_without_passwords(make_spec: MakeSpec) -> None:
    spec = make_spec()
    trial = json.loads(next(asking.ask(spec, 1)))["trial"]
    told = {"trial": trial, "state": "fail", "reason": f"no https://me:{SECRET}@host/x"}
    asking.tell(spec, json.dumps(told))
    assert opening.load_study(spec).trials[trial].user_attrs[outcome.MESSAGE] == (
        "no https://me:***@host/x"
    )


def test_the_log_shows_no_password(tmp_path: Path) -> None:
    with output.logged(tmp_path):
        logging.getLogger("optuna_lora_rl.x").info("fetching https://me:%s@host/x", SECRET)
    assert SECRET not in (tmp_path / output.LOG_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training.extra", {"hub_token": SECRET}, "training.extra.hub_token has no use"),
        ("data.train", f"https://me:{SECRET}@host/x.jsonl", "data.train is an address"),
        ("data.validation", f"s3://me:{SECRET}@bucket/x.jsonl", "data.validation is an address"),
        ("model", f"https://me:{SECRET}@host/model", "model.name is an address"),
    ],
)
def test_what_is_stored_with_a_study_holds_no_credentials(
    key: str,
    value: Any,
    said: str,
    study_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["validate", str(study_file({key: value}))])
    printed = capsys.readouterr()
    assert said in printed.err and SECRET not in printed.out + printed.err


def test_the_command_to_type_again_has_no_password() -> None:
    from optuna_lora_rl.commands.given import again

    typed = again(Path("a.yaml"), [f"storage=postgresql://me:{SECRET}@host/x", "budget.trials=5"])
    assert typed == "a.yaml --set storage=postgresql://me:***@host/x --set budget.trials=5"


def test_runs_of_a_comparison_show_no_password_in_the_list_of_processes(
    study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        started.append(command)
        return subprocess.CompletedProcess(command, 1, "", f"error: postgresql://me:{SECRET}@h/x")

    monkeypatch.setattr(subprocess, "run", run)
    content = merged(SMALL, {"output": str(tmp_path / "out"), "name": "small"})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(UserError, match="did not finish") as raised:
        comparison.compare(
            tmp_path / "small.yaml",
            samplers=["random"],
            seeds=1,
            workers=1,
            output=None,
            overrides=[f"storage=postgresql+psycopg://me:{SECRET}@127.0.0.1:1/x", "budget=2"],
            console=Console(quiet=True),
        )
    assert SECRET not in str(raised.value)
    assert started and SECRET not in str(started) and "budget=2" in started[0]


def test_the_module_can_be_run_with_a_bad_storage(study_file: Callable[..., Path]) -> None:
    file = study_file({"storage": f"postgresql+psycopg://me:a@{SECRET}@127.0.0.1:1/x"})
    done = subprocess.run(
        [sys.executable, "-m", "optuna_lora_rl", "status", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and SECRET not in done.stdout + done.stderr
    assert "%40" in done.stderr
