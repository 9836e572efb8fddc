"""Trackers of a run: whether they can follow it, and what transformers does not tell them.

transformers' own integrations log the losses. Here each tracker also gets the trial's number and
configuration when the run begins, and its state, score, quality and cost when it has ended. A
tracker that fails is left behind with a warning: it must not cost a trial.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from contextlib import suppress
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal
from typing import Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from transformers import Trainer

    from optuna_lora_rl.vocabulary import Value

State = Literal["complete", "pruned", "failed", "interrupted"]
# The variable of transformers that says where TensorBoard's files go.
TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"

_log = logging.getLogger(__name__)
_INTEGRATIONS = "transformers.integrations.integration_utils"


def obstacles(names: Iterable[str]) -> list[str]:
    """Returns a sentence for each tracker that cannot follow a run, as far as can be told here."""
    found = (_obstacle(name) for name in names)
    return [f"training.report_to: {sentence}" for sentence in found if sentence]


def _obstacle(name: str) -> str | None:
    if find_spec(name) is None:
        return (
            f"the tracker {name} is not installed; pip install 'optuna_lora_rl[{name}]', or leave "
            "it out"
        )
    if name == "mlflow" and os.environ.get("DISABLE_MLFLOW_INTEGRATION", "").upper() == "TRUE":
        return "the tracker mlflow is switched off by DISABLE_MLFLOW_INTEGRATION; unset it"
    if name == "wandb" and not _has_wandb_account():
        return (
            "the tracker wandb has no API key; run wandb login, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to write to this machine only"
        )
    return None


def _has_wandb_account() -> bool:
    settings = import_module("wandb").setup().settings
    if settings.mode in ("offline", "dryrun", "disabled"):
        return True
    if settings.api_key or settings.identity_token_file or "WANDB_API_KEY" in os.environ:
        return True
    host = urlsplit(settings.base_url).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


class Followed(Protocol):
    """What trackers are told of a run; a ``TrialRequest`` is one."""

    @property
    def number(self) -> int: ...

    @property
    def configuration(self) -> Mapping[str, Value]: ...

    @property
    def trackers_name(self) -> str | None: ...


class Follower:
    """One run in its trackers.

    Args:
        names: The trackers, of ``tensorboard``, ``wandb`` and ``mlflow``; none for none.
        run: The run.
    """

    def __init__(self, names: Iterable[str], run: Followed) -> None:
        self._number = run.number
        self._trackers: dict[str, _Tracker] = {name: _TRACKERS[name](run) for name in names}

    @property
    def names(self) -> list[str]:
        """The trackers that still follow."""
        return list(self._trackers)

    def joins(self, trainer: Trainer) -> None:
        """Follows a trainer that has transformers' integrations of the trackers."""
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__module__ != _INTEGRATIONS:
                continue
            name = type(callback).__name__.removesuffix("Callback").lower()
            for event in (event for event in dir(callback) if event.startswith("on_")):
                setattr(callback, event, self._spared(name, getattr(callback, event)))
            begins, own = callback.on_train_begin, self._trackers[name].begins
            callback.on_train_begin = _both(begins, self._spared(name, own))

    def ended(self, state: State, values: Mapping[str, float], reason: str = "") -> None:
        """Tells every tracker how the run ended, and closes it.

        Args:
            state: How.
            values: What is known of score, quality and cost.
            reason: Why it failed, in words.
        """
        for name, tracker in list(self._trackers.items()):
            self._spared(name, tracker.ended)(state, values, reason)

    def _spared(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function without its errors: after the first one it is not called again."""

        @wraps(function)
        def spared(*arguments: Any, **named: Any) -> Any:
            if name not in self._trackers:
                return None
            try:
                return function(*arguments, **named)
            except Exception as error:
                del self._trackers[name]
                words = f"{type(error).__name__}: {error}".splitlines()[0]
                _log.warning("trial %d goes on without %s: %s", self._number, name, words)
                return None

        return spared


def _both(first: Callable[..., Any], second: Callable[[], Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        control = first(*arguments, **named)
        second()
        return control

    return both


class _Tracker(Protocol):
    def begins(self) -> None:
        """The run is open in the tracker."""

    def ended(self, state: State, values: Mapping[str, float], reason: str) -> None:
        """The run is over."""


class _TensorBoard:
    def __init__(self, run: Followed) -> None:
        self._facts = {"trial": run.number, **run.configuration}
        # Left out, transformers finds a folder that it does not tell.
        self._folder = os.environ.get(TENSORBOARD_FOLDER)

    def begins(self) -> None:
        if self._folder is None:
            return
        rows = "".join(f"| {name} | {value} |\n" for name, value in self._facts.items())
        with self._writer() as writer:
            writer.add_text("trial/configuration", f"| parameter | value |\n|---|---|\n{rows}")

    def ended(self, state: State, values: Mapping[str, float], reason: str) -> None:
        if self._folder is None:
            return
        from tensorboard.plugins.hparams.api_pb2 import Status
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        scalars = {f"trial/{name}": value for name, value in values.items()}
        experiment, start, end = hparams({**self._facts, "state": state}, scalars)
        if state != "complete":
            # torch knows success only.
            plugin = end.value[0].metadata.plugin_data
            told = HParamsPluginData.FromString(plugin.content)
            told.session_end_info.status = Status.Value("STATUS_FAILURE")
            plugin.content = told.SerializeToString()
        with self._writer() as writer:
            writer.add_text("trial/state", f"{state}: {reason}" if reason else state)
            for name, value in scalars.items():
                writer.add_scalar(name, value)
            for summary in (experiment, start, end):
                writer.file_writer.add_summary(summary)

    def _writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder)


class _Wandb:
    def __init__(self, run: Followed) -> None:
        # Its lines would tear the display apart.
        os.environ.setdefault("WANDB_SILENT", "true")
        self._wandb = import_module("wandb")
        self._name = run.trackers_name
        self._facts = {"trial": {"number": run.number, **run.configuration}}

    def begins(self) -> None:
        self._wandb.config.update(self._facts, allow_val_change=True)

    def ended(self, state: State, values: Mapping[str, float], reason: str) -> None:
        run = self._wandb.run
        if run is None:
            # It failed before transformers opened one.
            project = os.environ.get("WANDB_PROJECT", "huggingface")
            run = self._wandb.init(project=project, name=self._name)
            run.config.update(self._facts, allow_val_change=True)
        told = {**values, "state": state, **({"reason": reason} if reason else {})}
        run.summary.update({f"trial/{name}": value for name, value in told.items()})
        run.tags = (*(run.tags or ()), state)
        # Otherwise transformers would write the next trial into the same run.
        run.finish(exit_code=0 if state == "complete" else 1)


class _Mlflow:
    def __init__(self, run: Followed) -> None:
        self._mlflow = import_module("mlflow")
        self._name = run.trackers_name
        self._facts: dict[str, Value] = {"trial/number": run.number}
        self._facts |= {f"trial/{name}": value for name, value in run.configuration.items()}
        self._run_id: str | None = None
        self._is_users = self._mlflow.active_run() is not None

    def begins(self) -> None:
        self._run_id = self._mlflow.active_run().info.run_id
        self._mlflow.log_params(self._facts)

    def ended(self, state: State, values: Mapping[str, float], reason: str) -> None:
        if self._mlflow.active_run() is None:
            # transformers has closed it as finished, or it failed before there was one.
            self._mlflow.start_run(run_id=self._run_id, run_name=self._name)
            if self._run_id is None:
                self._mlflow.log_params(self._facts)
        self._mlflow.log_metrics({f"trial/{name}": value for name, value in values.items()})
        self._mlflow.set_tags({"state": state, **({"reason": reason} if reason else {})})
        if not self._is_users:
            endings = {"complete": "FINISHED", "failed": "FAILED"}
            self._mlflow.end_run(endings.get(state, "KILLED"))


_TRACKERS: dict[str, Callable[[Followed], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
