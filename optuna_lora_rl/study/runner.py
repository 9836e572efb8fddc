"""Runs a study to its budget, however often it is interrupted on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal

import optuna

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.finetuning import process
from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.finetuning.errors import MachineError
from optuna_lora_rl.finetuning.trackers import TENSORBOARD_FOLDER
from optuna_lora_rl.samplers import CONTEXT_KEY
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import answering
from optuna_lora_rl.study import checks
from optuna_lora_rl.study import data_report
from optuna_lora_rl.study import fine_tuner
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import output
from optuna_lora_rl.study import report
from optuna_lora_rl.study import results
from optuna_lora_rl.study import storage
from optuna_lora_rl.study import verdict
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.display import Display
from optuna_lora_rl.study.heartbeat import Heartbeat
from optuna_lora_rl.study.interruption import Interruption
from optuna_lora_rl.study.opening import enqueue_guides
from optuna_lora_rl.study.opening import open_study
from optuna_lora_rl.study.opening import quiet
from optuna_lora_rl.study.outcome import Usage
from optuna_lora_rl.study.owner import Owner
from optuna_lora_rl.study.storage import database_errors
from optuna_lora_rl.study.trials import Trials

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.finetuning.cores import Cores
    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.options import TrainingOptions
    from optuna_lora_rl.finetuning.trial import TrialRequest
    from optuna_lora_rl.finetuning.trial import TrialResult
    from optuna_lora_rl.study.spec import StudySpec

Ending = Literal["budget", "others", "interruption", "failures"]
# The arithmetic of the study's trials, kept with it.
PRECISION = "precision"
EXIT_CODES: dict[Ending, int] = {"budget": 0, "others": 0, "failures": 1, "interruption": 130}


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        study: The study, with everything that it knows.
        ended_by: ``budget`` when it is used up, ``others`` when the rest of it runs in other
            workers, ``interruption`` after Ctrl-C, ``failures`` when every trial failed the same
            way.
        reason: The same in words.
        best_adapter: Folder of the best adapter in PEFT format, or None where there is none.
        shortfall: Why a study at its end has nothing to show (every trial failed or was pruned, or
            the best adapter is no better than none), in a sentence; None where it has.
        lost: Why ``best_adapter`` is not the best trial's, in a sentence; empty where it is.
    """

    study: optuna.Study
    ended_by: Ending
    reason: str
    best_adapter: Path | None
    shortfall: str | None = None
    lost: str = ""

    @property
    def exit_code(self) -> int:
        """What the command line ends with."""
        return 1 if self.shortfall else EXIT_CODES[self.ended_by]


def run(spec: StudySpec, *, display: Display | None = None) -> RunResult:
    """Runs the study until its budget is used up, or goes on with it.

    While another study runs in this process, in another thread, it waits.

    Args:
        spec: The study.
        display: Shows what happens; by default nothing is shown.

    Raises:
        UserError: If model, data, storage or disk cannot be used, or a launcher started this
            process as one of several.
    """
    process.check()
    checks.require(spec)
    display = display or Display()
    with (
        process.turn(lambda: display.says("another study runs in this process; this one waits")),
        database_errors(spec.storage_url),
        quiet(),
        _cores(spec, display) as cores,
        output.logged(spec.folder, display.says),
        Interruption() as interruption,
    ):
        worker = _Worker(spec, display, interruption, cores.settle)
        try:
            return worker.run()
        finally:
            worker.display.closes()


class _Worker:
    """One process at work on a study."""

    def __init__(
        self,
        spec: StudySpec,
        display: Display,
        interruption: Interruption,
        settle: Callable[[], None],
    ) -> None:
        self._began = time.monotonic()
        self.spec = spec
        self.display = display
        self.interruption = interruption
        self._settle = settle
        self.study = open_study(spec)
        self.owner = Owner(spec.folder)
        self._tuner: FineTuner | None = None
        self._own: list[FrozenTrial] = []
        self._configurations = spec.lora_space().count()

    def run(self) -> RunResult:
        self.display.opens(self.spec, self._trials())
        if settings := process.unused():
            said = ", ".join(settings)
            self.display.says(f"not used: {said}, which a launcher set; the file alone counts")
        for number in outcome.recover(self.study):
            self.display.says(f"trial {number} was killed in the middle; it runs once again")
        try:
            # More than once only where another worker is killed while this one ends.
            while self._may_begin():
                self._optimize()
            failure = outcome.hopeless(self._own, self._trials())
            if failure:
                return self._finish("failures", failure)
            usage = Usage.of(self._trials())
            if usage.running:
                return self._finish("others", usage.shared_out(self.spec.budget))
            self._test()
            self._ask()
            result = self._finish("budget", self._exhausted() or "the budget is used up")
            return replace(result, shortfall=verdict.shortfall(self.study))
        except KeyboardInterrupt:
            self.display.says("ending; Ctrl-C once more ends at once")
            return self._finish("interruption", "interrupted")

    def _optimize(self) -> None:
        with self.interruption.window():
            tuner = self._load()
            try:
                untuned = tuner.baseline()
            except (RuntimeError, MemoryError) as error:
                reason = first_line(error)
                raise UserError(f"the untuned model cannot be evaluated: {reason}") from error
        self.study.set_user_attr(report.UNTUNED, untuned.metrics())
        if not any(outcome.counts(trial) for trial in self._trials()):
            self._tell_forecast(tuner)
        if self.spec.packing != "off" and not self._is_packed():
            self.display.says("trials run one after the other: trackers follow one at a time")
        enqueue_guides(self.study, self.spec)
        self.display.works_on(Activity("proposing"))
        with self.owner, Heartbeat(self.study) as heartbeat:
            trials = Trials(
                self.study,
                self.spec,
                display=self.display,
                interruption=self.interruption,
                owner=self.owner,
                heartbeat=heartbeat,
                packed=self._is_packed(),
                may_begin=self._may_begin,
                ended=self._after_trial,
                settle=self._settle,
            )
            try:
                self._train(tuner, trials)
            except BaseException as error:
                trials.give_up(_why(error))
                raise
        self.study._storage.remove_session()

    def _train(self, tuner: FineTuner, trials: Trials) -> None:
        """Trains until no trial may begin and none runs."""
        if not self._is_packed():
            while (run := trials.next()) is not None:
                trials.done(run, self._alone(tuner, run))
            return
        packing = self.spec.packing
        size = packing if isinstance(packing, int) else None
        with self.interruption.window():
            tuner.run_packed(
                trials.next, trials.done, size=size, says=trials.says, alone=trials.alone
            )

    def _is_packed(self) -> bool:
        # Trackers follow one run at a time, and take its names from the environment.
        return self.spec.packing != "off" and not self.spec.training.report_to

    def _alone(self, tuner: FineTuner, run: TrialRequest) -> TrialResult | Exception:
        try:
            with _own_tensorboard_folder(self.spec, run.number), self.interruption.window():
                return tuner.run(
                    run.configuration,
                    number=run.number,
                    seed=run.seed,
                    report=run.report,
                    folder=run.folder,
                    trackers_name=run.trackers_name,
                    on_activity=run.on_activity,
                )
        except Exception as error:
            return error

    def _load(self) -> FineTuner:
        if self._tuner is None:
            what = f"loading {self.spec.model.name} and {self.spec.data.train}"
            self.display.works_on(Activity(what))
            self._tuner = fine_tuner.make(
                self.spec,
                training=self._training(),
                cache=self.spec.folder / "cache",
                on_activity=self.display.works_on,
            )
            notes = fine_tuner.prepare(self._tuner, self.spec)
            self._tell_where(self._tuner.precision)
            self._tell_data(self._tuner.data_facts())
            self._tell_sampler(self._tuner)
            for note in notes:
                self.display.says(note)
        return self._tuner

    def _tell_data(self, facts: dict[str, Any]) -> None:
        said = (data_report.line(facts), data_report.evaluations(facts))
        for sentence in filter(None, (*said, *data_report.warnings(facts))):
            self.display.says(sentence)
        self.study.set_user_attr(data_report.DATA, facts)

    def _tell_sampler(self, tuner: FineTuner) -> None:
        """Tells what is known before the first trial: model, data, run, and what costs what."""
        # With it comes torch.
        from optuna_lora_rl.samplers import RLSampler

        sampler, budget = self.study.sampler, self.spec.budget
        if isinstance(sampler, RLSampler):
            sampler.lasts(lambda trials: Usage.of(trials).trials_in_all(budget))
        if isinstance(sampler, RLSampler) and fine_tuner.CountedCost.holds(self.spec):
            sampler.charge(fine_tuner.CountedCost(self.spec, tuner))
        if CONTEXT_KEY not in self.study.user_attrs and not self._trials():
            known = fine_tuner.context(self.spec, tuner)
            self.study.set_user_attr(CONTEXT_KEY, known.as_dict())

    def _training(self) -> TrainingOptions:
        """How trials train: in the arithmetic in which the study began, where this machine can."""
        from optuna_lora_rl.finetuning import device

        training, begun = self.spec.training, self.study.user_attrs.get(PRECISION)
        if training.precision != "auto" or begun is None:
            return training
        if device.can(begun, device.device_of(training.use_cpu)):
            return training.model_copy(update={"precision": begun})
        self.display.says(f"this study began in {begun}, which this machine has not")
        return training

    def _tell_where(self, precision: str) -> None:
        from optuna_lora_rl.finetuning import device

        if PRECISION not in self.study.user_attrs:
            self.study.set_user_attr(PRECISION, precision)
        where = device.described(precision, device.device_of(self.spec.training.use_cpu))
        self.display.says(f"training on {where}")
        known = self.study.user_attrs.get(report.DEVICES, [])
        if where not in known:
            self.study.set_user_attr(report.DEVICES, [*known, where])

    def _tell_forecast(self, tuner: FineTuner) -> None:
        with self.interruption.window():
            try:
                found = tuner.forecast()
            except FineTuningError as error:
                # The trials may be others, and tell their own failures.
                reason = first_line(error)
                self.display.says(f"a typical trial could not be measured: {reason}")
                return
            except MachineError as error:
                raise UserError(
                    f"the machine failed as two steps were measured: {error}"
                ) from error
        self.display.says(fine_tuner.forecast(found, self.spec.budget))

    def _may_begin(self) -> bool:
        # Failures may stop looking hopeless: a trial that ran beside them succeeds.
        return not (self._exhausted() or outcome.hopeless(self._own, self._trials()))

    def _after_trial(self, trial: FrozenTrial) -> None:
        self._own.append(trial)
        self.display.trial_ends(trial, self._trials())
        adapters.drop_others(self.study, self.spec.folder)

    def _finish(self, ended_by: Ending, reason: str) -> RunResult:
        outcome.recover(self.study)
        self.display.works_on(Activity("writing the report"))
        best = results.write(self.study, self.spec)
        return RunResult(self.study, ended_by, reason, best.folder, lost=best.lost)

    def _test(self) -> None:
        """Evaluates the final best on the test split, once for each best trial."""
        there = adapters.best_there(self._trials(), self.spec.folder)
        known: dict[str, Any] = self.study.user_attrs.get(report.TEST, {})
        if there.trial is None or there.folder is None:
            return
        best = outcome.best_of(self._trials())
        if known.get("trial") in {trial.number for trial in (best, there.trial) if trial}:
            return
        with self.interruption.window():
            tuner = self._load()
            try:
                evaluation = tuner.test(there.folder)
            except (RuntimeError, MemoryError, UserError) as error:
                # The study is done; it must not lose its adapter to this.
                self.display.says(f"the test split could not be evaluated: {first_line(error)}")
                return
        metrics = {} if evaluation is None else evaluation.metrics()
        self.study.set_user_attr(report.TEST, {"trial": there.trial.number, **metrics})

    def _ask(self) -> None:
        """Lets the untuned model, the guides' configuration and the best answer questions."""
        who = answering.wanted(self.study, self.spec)
        if not who:
            return
        with self.interruption.window():
            try:
                answering.ask(self.study, self.spec, self._load(), who)
            except (RuntimeError, MemoryError, UserError) as error:
                # Nor to this.
                reason = first_line(error)
                self.display.says(f"held-out questions could not be answered: {reason}")

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _exhausted(self) -> str | None:
        budget = self.spec.budget
        elapsed = (time.monotonic() - self._began) / 3600
        if budget.wall_hours is not None and elapsed >= budget.wall_hours:
            return f"{wording.of_hours(elapsed, budget.wall_hours)} on the clock"
        trials = self._trials()
        if self._configurations is not None and outcome.tried(trials) >= self._configurations:
            return f"all {self._configurations} configurations of the space"
        return Usage.of(trials).exhausted(budget)


def _why(error: BaseException) -> str:
    """Why trials end that did nothing wrong, when ``error`` ends the run."""
    if isinstance(error, KeyboardInterrupt):
        return "the run was interrupted"
    if storage.fatal_cause(error) is not None:
        return "the disk or the database failed"
    return f"the run ended by an error: {first_line(error)}"


@contextmanager
def _own_tensorboard_folder(spec: StudySpec, number: int) -> Iterator[None]:
    """Keeps a trial's TensorBoard files apart from its adapter, which may be deleted."""
    before = os.environ.get(TENSORBOARD_FOLDER)
    base = Path(before) if before else spec.folder / "tensorboard"
    os.environ[TENSORBOARD_FOLDER] = str(base / f"trial-{number:04d}")
    try:
        yield
    finally:
        if before is None:
            del os.environ[TENSORBOARD_FOLDER]
        else:
            os.environ[TENSORBOARD_FOLDER] = before


def _cores(spec: StudySpec, display: Display) -> Cores:
    """The run's share of the cores: of one for a built-in model.

    It is too small for more: they would wait for each other, for ages on a busy machine, and
    sums in another order would make results depend on the number of cores.
    """
    from optuna_lora_rl import tiny
    from optuna_lora_rl.finetuning.cores import Cores

    return Cores(1 if spec.model.name in tiny.MODELS else None, display.says)
