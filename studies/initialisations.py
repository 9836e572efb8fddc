"""How LoRA's factors begin: our starts and PEFT's, each at its own learning rate.

    python studies/initialisations.py

All adapters are alike but for their start: rank 4 and a scale alpha / r of 2 on all linear
modules, so that their parameters are equal. Of each start the best of five learning rates is taken
on each task, and of six where the best of five stands at an end, on a selection seed; it is then
judged on other seeds. The tasks are those of the comparison of rank strategies. Left out are
LoftQ, which quantises the base weights, MiCA, which trains half of the parameters, CorDA, whose
code in PEFT needs a further package, and our starts of both factors, of which svd-both is PiSSA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comparing
import four_panels
import measuring
import numpy as np
import rank_strategies
import rates
from arms import Arm
from comparing import Found

FILE = str(Path(__file__).resolve())
RECORDS = measuring.FOLDER.parent / "logs" / "initialisations.jsonl"
RANK, SCALE = 4, 2.0
STEPS, EVALUATIONS = 32, 4
RATES, FACTOR, MOST_RATES = (1.3e-3, 3.2e-3, 8e-3, 2e-2, 5e-2), 2.5, 6
SELECTION = (100,)
BASELINE = "default (PEFT)"
OURS = ("xavier", "kaiming", "orthogonal-rows", "svd", "layer-adaptive", "weight-adaptive")
PEFT = ("gaussian", "orthogonal", "pissa", "olora")
ARMS: dict[str, Arm] = {
    BASELINE: Arm("PEFT", {"lora_rank": RANK}),
    **{name: Arm("ours", {"lora_rank": RANK, "init_lora_weights": name}) for name in OURS},
    **{
        f"{name} (PEFT)": Arm("PEFT", {"lora_rank": RANK, "init_lora_weights": name})
        for name in PEFT
    },
    "EVA (PEFT)": Arm("PEFT", {"lora_rank": RANK}, peft="eva-even"),
    "LoRA-GA (PEFT)": Arm("PEFT", {"lora_rank": RANK}, peft="lora_ga"),
}
COLORS = {"ours": "#0f766e", "PEFT": "#be123c"}
_DEFAULT = "#111827"
START = {
    "a_norm": "norm of A",
    "a_spectral_norm": "spectral norm of A",
    "a_condition": "condition of A",
    "update_spectral_norm": "spectral norm of s B A",
    "gradient_norm": "gradient norm",
}


def markdown(entries: dict[str, Any]) -> str:
    """The page."""
    (entry,) = entries.values()
    found = entry["tasks"]
    lines = ["# How LoRA's factors begin", ""]
    lines += ["What it says: [the reading](initialisations_reading.md).", ""]
    lines += ["![Loss, accuracy, final accuracy and parameters](initialisations.svg)", ""]
    lines += measuring.provenance(entry)
    lines += comparing.paragraphs(__doc__)
    if entry["note"]:
        lines += [entry["note"], ""]
    lines += comparing.quality_table(found)
    lines += comparing.difference_table(entry["differences"], found, BASELINE)
    lines += _chosen(entry["chosen"])
    lines += _starts(found)
    lines += comparing.tried_table(found)
    return "\n".join(lines)


def _chosen(answer: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "## The best by selection",
        "",
        "The start that came out best on the selection seed, judged on the others: what taking "
        f"the best of {len(ARMS)} starts buys.",
        "",
        f"| task | chosen | against {BASELINE} |",
        "|---|---|---|",
    ]
    for task, one in answer.items():
        lines.append(f"| {task} | {one['chosen']} | {comparing.signed(one['difference'])} |")
    return [*lines, ""]


def _starts(found: Found) -> list[str]:
    took = comparing.times(found, BASELINE)
    lines = [
        "## Starts and courses",
        "",
        "Before training, as means over layers, tasks and seeds: the Frobenius norm, spectral "
        "norm and condition number of A, and the spectral norm of the update scale * B A, which "
        "the base weights make up for; and the norm of the gradient of all factors at the first "
        "step, before clipping. Then the step at which 95% of the final quality was there, of "
        f"those evaluated, the CPU seconds over those of {BASELINE} (preparation included), "
        "geometric mean with its 95% bootstrap interval over tasks and seeds, and the parameters.",
        "",
        f"| | {' | '.join(START.values())} | step | time | parameters |",
        "|---" * (len(START) + 4) + "|",
    ]
    for name in next(iter(found.values())):
        arms = [by_name[name] for by_name in found.values() if by_name[name]["start"]]
        cells = [f"{np.mean([arm['start'][which] for arm in arms]):.3g}" for which in START]
        step = np.mean([np.mean(arm["reached"]) for arm in arms])
        parameters = np.mean([arm["parameters"]["final"] for arm in arms])
        lines.append(
            f"| {name} | {' | '.join(cells)} | {step:.0f} | {measuring.shown(took[name])} | "
            f"{parameters:,.0f} |"
        )
    return [*lines, ""]


def colors() -> dict[str, str]:
    """The colour of each arm: that of its group, but for the baseline."""
    return {
        name: _DEFAULT if name == BASELINE else COLORS[arm.group] for name, arm in ARMS.items()
    }


def chosen(found: Found) -> dict[str, Any]:
    """Compare what the selection seed liked best on each task with the baseline."""
    answer: dict[str, Any] = {}
    for task, arms in found.items():
        name = max(arms, key=lambda name: max(arms[name]["tried"].values()))
        gaps = np.subtract(arms[name]["quality"], arms[BASELINE]["quality"]).tolist()
        answer[task] = {"chosen": name, "difference": rates.over_seeds(gaps)}
    return answer


def tasks_of(given: argparse.Namespace) -> list[str]:
    """Return the tasks: those that are named, or those of the other comparison's pilot."""
    if given.tasks:
        return list(given.tasks)
    runs = comparing.Runs(
        rank_strategies.ARMS,
        measuring.Records(rank_strategies.RECORDS),
        steps=rank_strategies.STEPS,
        scale=rank_strategies.SCALE,
        training=rank_strategies.TRAINING,
    )
    return rank_strategies.taken(
        rank_strategies.piloted(runs, rank_strategies.CANDIDATES, rank_strategies.TASKS)
    )


def main(arguments: Sequence[str]) -> None:
    """The command line of this file."""
    given = _options(arguments)
    measuring.stay_offline("tiny")
    measuring.set_threads(1)
    records = measuring.Records(given.records)
    runs = comparing.Runs(ARMS, records, steps=given.steps, scale=SCALE, training={})
    tried = comparing.selected(
        runs, tasks_of(given), tuple(ARMS), SELECTION, given.rates, FACTOR, given.most_rates
    )
    found = comparing.judged(runs, tried, given.seeds, EVALUATIONS)
    untuned: Mapping[str, Mapping[str, float]] = {task: runs.untuned(task) for task in found}
    entry = {
        **measuring.circumstances(FILE, arguments, records.revisions),
        "note": given.note,
        "untuned": untuned,
        "tasks": found,
        "differences": comparing.compared(found, BASELINE),
        "chosen": chosen(found),
    }
    stem = given.output / "initialisations"
    print(measuring.publish(stem, "initialisations", entry, markdown))
    svg = four_panels.figure(
        comparing.drawn(found, untuned, colors()),
        title=f"Initialisations, means over {len(found)} tasks and {given.seeds} seeds",
        loss="validation loss, share of the untuned model's",
        accuracy="token accuracy",
        legend=[(BASELINE, _DEFAULT), *COLORS.items()],
    )
    stem.with_suffix(".svg").write_text(svg + "\n", encoding="utf-8")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare how LoRA's factors begin.")
    parser.add_argument(
        "--tasks", type=measuring.words, help="those of rank_strategies.py by default"
    )
    parser.add_argument("--seeds", type=int, default=5, help="judging seeds")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", type=_numbers, default=RATES)
    parser.add_argument("--most-rates", type=int, default=MOST_RATES)
    measuring.add_recording(parser, RECORDS)
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main(sys.argv[1:])
