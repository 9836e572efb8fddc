"""What trackers are told of a study's trials, read as their own programs read it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from optuna_lora_rl import cli
from optuna_lora_rl import tune
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import display
from optuna_lora_rl.study import runner
from optuna_lora_rl.study.spec import StudySpec
from tests.study.conftest import SMALL
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner

STATES = ["complete", "pruned", "failed"]

# wandb and mlflow-skinny bring some 30 packages and 100 MB each, half a minute of installation.
LEFT_OUT = (
    "the extra test leaves wandb and mlflow out, which take long: pip install wandb mlflow-skinny"
)


class Said(display.Display):
    def __init__(self) -> None:
        self.sentences: list[str] = []

    def says(self, sentence: str) -> None:
        self.sentences.append(sentence)


def three_endings(make_spec: MakeSpec, tracker: str) -> tuple[StudySpec, Any]:
    """Runs a study of a completed, a pruned and a failed trial."""
    spec = make_spec(
        {
            "training.report_to": [tracker],
            "space.learning_rate": 3e-3,
            "space.max_steps": 8,
            # One learns, one learns nothing, and the third there is not.
            "space.optim": ["adamw_torch", "sgd", "no-such-optimizer"],
            "pruner": {"name": "threshold", "lower": 0.0},
        }
    )
    study = runner.open_study(spec)
    for optim in spec.space["optim"]:
        study.enqueue_trial({"optim": optim, "lora_rank": 4, "target_modules": "qv"})
    result = runner.run(spec)
    states = [trial.state for trial in result.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    return spec, result.study


def test_tensorboard_has_configuration_score_cost_and_how_each_trial_ended(
    make_spec: MakeSpec,
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    spec, study = three_endings(make_spec, "tensorboard")
    ended: dict[str, int] = {}
    for trial, state in zip(study.trials, STATES, strict=True):
        events = EventAccumulator(str(spec.folder / "tensorboard" / f"trial-{trial.number:04d}"))
        events.Reload()
        read = HParamsPluginData.FromString
        metadata = {name: one.plugin_data.content for name, one in events.summary_metadata.items()}
        start = read(metadata["_hparams_/session_start_info"]).session_start_info
        end = read(metadata["_hparams_/session_end_info"]).session_end_info
        assert start.hparams["state"].string_value == state
        assert start.hparams["lora_rank"].number_value == 4
        assert start.hparams["optim"].string_value == trial.params["optim"]
        assert start.hparams["trial"].number_value == trial.number
        ended[state] = end.status
        (text,) = events.Tensors("trial/state/text_summary")[0].tensor_proto.string_val
        assert text.decode().startswith(state)
        for name in ("score", "quality", "cost") if state != "failed" else ():
            (told,) = events.Scalars(f"trial/{name}")
            assert told.value == pytest.approx(trial.user_attrs[name], rel=1e-3)
    assert ended == {"complete": 1, "pruned": 2, "failed": 2}


def test_wandb_has_configuration_score_cost_and_how_each_trial_ended(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wandb = pytest.importorskip("wandb", reason=LEFT_OUT)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    runs: list[Any] = []
    finish = wandb.Run.finish

    def finished(run: Any, exit_code: int | None = None, **rest: Any) -> None:
        runs.append((dict(run.config), dict(run.summary), exit_code, run.name))
        finish(run, exit_code=exit_code, **rest)

    monkeypatch.setattr(wandb.Run, "finish", finished)
    _, study = three_endings(make_spec, "wandb")
    assert [code for _, _, code, _ in runs] == [0, 1, 1]
    for (config, summary, _, name), trial, state in zip(runs, study.trials, STATES, strict=True):
        assert name == f"small-trial-{trial.number:04d}"
        assert config["trial"]["number"] == trial.number
        assert config["trial"]["lora_rank"] == 4
        assert summary["trial/state"] == state
        for key in ("score", "quality", "cost") if state != "failed" else ():
            assert summary[f"trial/{key}"] == pytest.approx(trial.user_attrs[key], rel=1e-3)


def test_mlflow_has_configuration_score_cost_and_how_each_trial_ended(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow", reason=LEFT_OUT)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    _, study = three_endings(make_spec, "mlflow")
    runs = mlflow.MlflowClient().search_runs(["0"], order_by=["attributes.start_time"])
    assert [run.info.status for run in runs] == ["FINISHED", "KILLED", "FAILED"]
    for run, trial, state in zip(runs, study.trials, STATES, strict=True):
        assert run.info.run_name == f"small-trial-{trial.number:04d}"
        assert run.data.params["trial/number"] == str(trial.number)
        assert run.data.params["trial/lora_rank"] == "4"
        assert run.data.tags["state"] == state
        for key in ("score", "quality", "cost") if state != "failed" else ():
            told = run.data.metrics[f"trial/{key}"]
            assert told == pytest.approx(trial.user_attrs[key], rel=1e-3)


def test_a_tracker_that_fails_costs_no_trial_and_is_said(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def lost(writer: SummaryWriter, *_: Any, **__: Any) -> None:
        raise ConnectionError("the server hung up")

    monkeypatch.setattr(SummaryWriter, "add_scalar", lost)
    said = Said()
    spec = make_spec({"training.report_to": ["tensorboard"], "budget": 2})
    study = runner.run(spec, display=said).study
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    expected = [
        f"trial {n} goes on without tensorboard: ConnectionError: the server hung up"
        for n in (0, 1)
    ]
    assert [line for line in said.sentences if "tensorboard" in line] == expected
    assert (spec.folder / "log.txt").read_text().count("goes on without tensorboard") == 2


def test_a_tracker_that_is_not_there_is_refused_before_the_first_trial(
    study_file: Callable[..., Path],
    make_spec: MakeSpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    paper: type[PaperTuner],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    changes = {"training.report_to": ["wandb"]}
    words = "the tracker wandb is not installed; pip install 'optuna_lora_rl[wandb]'"
    spec = make_spec(changes)
    with pytest.raises(UserError) as refused:
        runner.run(spec)
    assert words in str(refused.value)
    assert not (spec.folder / "study.db").exists() and not paper.seeds
    with pytest.raises(UserError, match="wandb is not installed"):
        tune(
            train="tiny:dates-small",
            model="tiny",
            space=SMALL["space"],
            output=tmp_path / "tuned",
            training={"report_to": ["wandb"]},
        )
    for command in ("validate", "run"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, str(study_file(changes))])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_weights_and_biases_without_a_key_is_refused(
    study_file: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("wandb", reason=LEFT_OUT)
    hidden = {"WANDB_API_KEY", "WANDB_MODE", "NETRC"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    file = study_file({"training.report_to": ["wandb"]})
    command = [sys.executable, "-m", "optuna_lora_rl", "validate", str(file)]

    def said(**more: str) -> subprocess.CompletedProcess[str]:
        env = {**environment, "HOME": str(tmp_path), **more}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    refused = said()
    assert refused.returncode == 2
    assert "wandb has no API key; run wandb login, set WANDB_API_KEY" in refused.stderr
    assert said(WANDB_MODE="offline").returncode == 0
    assert said(WANDB_API_KEY="x" * 40).returncode == 0
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    kept = said(WANDB_BASE_URL="https://api.wandb.ai")
    assert kept.returncode == 0, kept.stderr
