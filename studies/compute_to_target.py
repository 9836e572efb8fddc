"""Compute to target: what it takes to reach the score that the naive arm has after 50 trials.

    python studies/compute_to_target.py

For each task and seed the naive arm (``studies/naive.py``: a fresh ``from_pretrained`` and
``SFTTrainer`` for each trial, TPE, MedianPruner) runs 50 trials; its best score is the target.
The other arms add one part after another and stop when a finished trial reaches the target:

    naive         Optuna + TRL as one writes it today
    shared base   FineTuner.run: the model loaded and the data tokenised once; TPE, MedianPruner
    sampler       RLSampler instead of TPE
    pruner        another pruner than MedianPruner
    options       other training options, where ``--training`` gives any
    packing       FineTuner.run_packed

The score is the package's: quality - 0.1 * cost, with the counted cost. The naive arm's is
computed by the same functions from the validation loss that its trainer reports; equal
configurations have equal losses. All arms tune the same parameters, evaluate at the same steps,
and ask the pruner at each evaluation but the last. The study lies in memory. A score less than
0.001 below the target reaches it, for all arms alike: equal configurations on other numbers of
threads differ by so much at most, and the noise of a score is ten times that.

Compute is counted in tokens that were trained on, without padding, those of runs that are pruned
or were under way at the end included; evaluated tokens are counted apart. Seconds are the
process's on the processors, all threads together, which other work on the machine changes little
(on a GPU those of the wall), from the first question to the sampler (in the package's arms: from
the loading of the model) to the end of the trial that reaches the target; imports are not
counted. All arms have one thread. An arm that has
not reached the target after twice the trials is counted with twice what it has spent (PAR2, the
habit of algorithm configuration), and the table says how many there are.

Every (task, seed, arm) is a fresh process and a line of the records; what the records hold is not
run again, so remove them when the code has changed. The results name the revisions they are of.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import measuring
from compute_to_target_tables import markdown
from compute_to_target_tables import summarise
from search_to_target import Search

if TYPE_CHECKING:
    import optuna

    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.trial import TrialResult

FILE = str(Path(__file__).resolve())
# Short ones, none of those that the pruners' options were chosen on
# (studies/results/pruner_replay_reading.md), of families that the policy was not trained on (its
# weights were chosen on the last two families).
TASKS = ("cipher-small", "plurals-small", "reviews-ample", "units-ample")
# What naive.suggest says in Optuna's words.
SPACE: dict[str, Any] = {
    "lora_rank": {"low": 2, "high": 64, "log": True},
    "lora_alpha": {"ratio": {"low": 0.5, "high": 8, "log": True}, "of": "lora_rank"},
    "lora_dropout": {"low": 0.0, "high": 0.3},
    "target_modules": ["qv", "attention", "mlp", "all-linear"],
    "learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
    "batch_size": [4, 8, 16],
}
_MEDIAN = "Optuna's MedianPruner"


@dataclass(frozen=True)
class Arm:
    """Which parts an arm has.

    Attributes:
        name: That of the part that it adds.
        shares: Whether trials share one base model.
        sampler: ``tpe`` or ``rl``.
        packs: Whether trials train side by side.
        prunes: Whether it has the pruner that was asked for.
        options: Whether it has the training options that were asked for.
    """

    name: str
    shares: bool = True
    sampler: str = "rl"
    packs: bool = True
    prunes: bool = True
    options: bool = False


ARMS = (
    Arm("naive", shares=False, sampler="tpe", packs=False, prunes=False),
    Arm("shared base", sampler="tpe", packs=False, prunes=False),
    Arm("sampler", packs=False, prunes=False),
    Arm("pruner", packs=False),
    Arm("options", packs=False, options=True),
    Arm("packing", options=True),
)


class _Reached(Exception):
    """Ends a pack when a trial has reached the target."""


def prepare(job: measuring.Job) -> Callable[[], measuring.Result]:
    """Import everything; what is returned runs the study."""
    import optuna

    # Not loaded by the modules that name it, and not to be paid for by the first proposal.
    import optuna_lora_rl.samplers.rl  # noqa: F401

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    measuring.set_threads(job["threads"])
    tuner = _tuner(job)
    if not job["shares"]:
        return _naive(job, tuner)
    return partial(_package, job, tuner)


def _study(job: measuring.Job) -> optuna.Study:
    import optuna

    from optuna_lora_rl import pruners
    from optuna_lora_rl import samplers

    # The number of trials that the study is planned with, whatever the most.
    options = {"n_trials": job["planned"]} if job["sampler"] == "rl" else {}
    pruner: optuna.pruners.BasePruner = optuna.pruners.MedianPruner()
    if job["pruner"] != _MEDIAN:
        pruner = pruners.create(job["pruner"], first_step=1, last_step=job["evaluations"])
    return optuna.create_study(
        direction="maximize",
        sampler=samplers.create(job["sampler"], seed=job["seed"], options=options),
        pruner=pruner,
    )


def _tuner(job: measuring.Job) -> FineTuner:
    from optuna_lora_rl.finetuning.finetuner import FineTuner
    from optuna_lora_rl.finetuning.options import DataOptions
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.finetuning.options import ObjectiveOptions

    return FineTuner(
        ModelOptions(name=job["model"]),
        DataOptions(train=job["data"], max_validation_samples=256),
        measuring.training_options(job),
        ObjectiveOptions(reference={"max_steps": job["steps"]}),
    )


def _naive(job: measuring.Job, tuner: FineTuner) -> Callable[[], measuring.Result]:
    import naive
    import optuna

    from optuna_lora_rl.finetuning.model import path_of

    folder = tempfile.TemporaryDirectory()
    data = naive.read(*measuring.rows(tuner.data, Path(folder.name)), Path(folder.name, "cache"))
    setup = naive.Setup(
        model=path_of(tuner.model),
        evaluations=job["evaluations"],
        seed=job["seed"],
        on_gpu=measuring.on_gpu(job["device"]),
        folder=folder.name,
    )
    score = scores(tuner)

    def run() -> measuring.Result:
        with folder, measuring.counted() as tokens:
            search = Search(_study(job), lambda t: naive.suggest(t, job["steps"]), job, tokens)
            while (asked := search.ask()) is not None:
                trial, configuration = asked
                report = search.report(trial)

                def reported(step: int, loss: float) -> None:
                    report(score(configuration, loss))  # noqa: B023

                try:
                    loss = naive.train(configuration, setup, data, reported)
                except optuna.TrialPruned as pruned:
                    search.tell(trial, pruned)
                else:
                    search.tell(trial, score(configuration, loss))
            return search.result()

    return run


def scores(tuner: FineTuner) -> Callable[[Mapping[str, Any], float], float]:
    """Return the package's score as a function of a configuration and its validation loss."""
    from optuna_lora_rl.finetuning.evaluation import quality

    untuned = tuner.baseline()

    def score(configuration: Mapping[str, Any], loss: float) -> float:
        cost = tuner.estimate(configuration)[1]["total"]
        return quality("loss", {"loss": loss}, untuned) - tuner.objective.cost_weight * cost

    return score


def _package(job: measuring.Job, tuner: FineTuner) -> measuring.Result:
    from optuna_lora_rl.space import LoraSpace

    suggest = LoraSpace(SPACE | {"max_steps": job["steps"]}).suggest
    with measuring.counted() as tokens:
        search = Search(_study(job), suggest, job, tokens)
        tuner.prepare()
        tuner.baseline()
        (_packed if job["packs"] else _one_by_one)(search, tuner, job)
        return search.result()


def _one_by_one(search: Search, tuner: FineTuner, job: measuring.Job) -> None:
    while (asked := search.ask()) is not None:
        trial, configuration = asked
        report = search.report(trial)
        outcome: float | Exception
        try:
            outcome = tuner.run(configuration, report=lambda n, score, _: report(score)).score  # noqa: B023
        except Exception as error:
            outcome = error
        search.tell(trial, _expected(outcome))


def _packed(search: Search, tuner: FineTuner, job: measuring.Job) -> None:
    from optuna_lora_rl.finetuning.trial import TrialRequest

    running: dict[int, optuna.Trial] = {}

    def runs() -> TrialRequest | None:
        asked = search.ask()
        if asked is None:
            return None
        trial, configuration = asked
        running[trial.number] = trial
        report = search.report(trial)
        return TrialRequest(trial.number, configuration, report=lambda n, score, _: report(score))

    def done(run: TrialRequest, result: TrialResult | Exception) -> None:
        outcome = result if isinstance(result, Exception) else result.score
        search.tell(running.pop(run.number), _expected(outcome))
        if search.reached:
            raise _Reached

    with suppress(_Reached):
        tuner.run_packed(runs, done, size=job["size"])


def _expected(outcome: float | Exception) -> float | Exception:
    """Return an outcome that trials may have; anything else is a bug and shall be seen."""
    import optuna

    from optuna_lora_rl.finetuning.errors import FineTuningError

    if isinstance(outcome, Exception) and not isinstance(
        outcome, optuna.TrialPruned | FineTuningError
    ):
        raise outcome
    return outcome


def measure(
    given: argparse.Namespace, records: measuring.Records
) -> dict[tuple[str, int], dict[str, measuring.Result]]:
    """Run what the records lack, and return all results by task and seed, and by arm."""
    found: dict[tuple[str, int], dict[str, measuring.Result]] = {}
    # Seeds outermost: what is there of a stopped run covers all tasks.
    for seed in range(given.seeds):
        for task in given.tasks:
            own = found[task, seed] = {}
            for arm in arms(given):
                target = None if arm.name == "naive" else own["naive"]["best"]
                job = _job(given, arm, task, seed, target)
                key = {**job, "arm": arm.name, "machine": measuring.machine()}
                result = records.find(key)
                if result is None:
                    result = measuring.launch(FILE, [job])[0]
                    records.add(key, result)
                own[arm.name] = result
                print(
                    f"{task} {seed} {arm.name}: best {result['best']:.4f} after "
                    f"{result['trials']} trials, {result['tokens']} tokens, "
                    f"{result['seconds']:.0f} s",
                    flush=True,
                )
    return found


def arms(given: argparse.Namespace) -> list[Arm]:
    return [
        arm for arm in ARMS if arm.name in given.arms and (given.training or arm.name != "options")
    ]


def _job(
    given: argparse.Namespace, arm: Arm, task: str, seed: int, target: float | None
) -> measuring.Job:
    training = dict(given.training) if arm.options else {}
    return {
        "model": given.model,
        "device": given.device,
        "data": f"tiny:{task}",
        "seed": seed,
        "steps": given.steps,
        "evaluations": training.pop("evaluations", given.evaluations),
        "planned": given.trials,
        "trials": given.trials if arm.name == "naive" else 2 * given.trials,
        "target": target,
        "shares": arm.shares,
        "sampler": arm.sampler,
        "packs": arm.packs,
        "size": given.size if arm.packs else 1,
        "pruner": given.pruner if arm.prunes else _MEDIAN,
        "training": training,
        "threads": given.threads,
    }


def main(arguments: Sequence[str]) -> None:
    """The command line of this file."""
    given = _options(arguments)
    measuring.stay_offline(given.model)
    records = measuring.Records(given.records)
    found = measure(given, records)
    settings = {
        name: value for name, value in vars(given).items() if name not in ("records", "output")
    }
    entry = {
        **measuring.circumstances(FILE, arguments, records.revisions),
        "settings": settings,
        "summary": summarise(found, [arm.name for arm in arms(given)]),
    }
    print(measuring.publish(given.output / "compute_to_target", given.name, entry, markdown))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the compute to a given score.")
    parser.add_argument("--name", default="The built-in model", help="heading of the results")
    parser.add_argument("--model", default="tiny", help="tiny, a folder, or a hub name")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu"))
    parser.add_argument("--tasks", default=TASKS, type=lambda text: tuple(text.split(",")))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=50, help="of the naive arm")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a trial")
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--size", type=int, default=8, help="of the packs")
    parser.add_argument("--pruner", default="async-halving", help="by the package's names")
    parser.add_argument(
        "--training",
        default={},
        type=json.loads,
        help="training options of a last arm, in JSON, such as evaluation subsets",
    )
    parser.add_argument("--threads", type=int, default=1, help="of every arm")
    parser.add_argument(
        "--arms",
        default=[arm.name for arm in ARMS],
        type=measuring.words,
        help="of those above, separated by commas; the naive one is always needed",
    )
    parser.add_argument(
        "--records", type=Path, default=measuring.FOLDER.parent / "logs/compute_to_target.jsonl"
    )
    parser.add_argument("--output", type=Path, default=measuring.RESULTS)
    given = parser.parse_args(arguments)
    if unknown := set(given.arms) - {arm.name for arm in ARMS}:
        parser.error(f"--arms names {', '.join(sorted(unknown))}, which is none of them")
    if "naive" not in given.arms:
        parser.error("--arms has to name naive, whose result is the others' target")
    if given.steps % given.evaluations:
        parser.error("--steps has to be a multiple of --evaluations, for equal work")
    return given


if __name__ == "__main__":
    measuring.program(main, prepare)
