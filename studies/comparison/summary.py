"""What the records of a comparison say: numbers as JSON, tables as markdown."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optuna_lora_rl.learning import statistics
from optuna_lora_rl.learning.writing import cell
from optuna_lora_rl.learning.writing import footer
from optuna_lora_rl.learning.writing import table
from optuna_lora_rl.learning.writing import versions
from studies.comparison.problem import Problem
from studies.comparison.protocol import Protocol
from studies.comparison.running import Key
from studies.comparison.running import Record

PACKAGES = ("optuna", "torch", "numpy", "scipy", "cmaes", "smac")


@dataclass(frozen=True)
class Curves:
    """Regrets of every sampler on some problems, shapes (P, S, T).

    Args:
        problems: their names.
        clusters: a number for each; problems of one surface have the same.
        regret: of the best configuration so far, by sampler.
        chosen: of the one that looked best.
        failed: share of a study's trials that failed, shape (P, S), by sampler.
    """

    problems: tuple[str, ...]
    clusters: tuple[int, ...]
    regret: Mapping[str, np.ndarray]
    chosen: Mapping[str, np.ndarray]
    failed: Mapping[str, np.ndarray]

    def of(self, names: Sequence[str]) -> Curves:
        """Those of some of the problems."""
        rows = [self.problems.index(name) for name in names]
        return Curves(
            tuple(names),
            tuple(self.clusters[row] for row in rows),
            {label: curve[rows] for label, curve in self.regret.items()},
            {label: curve[rows] for label, curve in self.chosen.items()},
            {label: share[rows] for label, share in self.failed.items()},
        )


def curves(
    protocol: Protocol, problems: Sequence[Problem], records: Mapping[Key, Record]
) -> Curves:
    """The records as arrays."""

    def array(label: str, of: Callable[[Record], Any]) -> np.ndarray:
        return np.array(
            [
                [of(records[label, problem.name, seed]) for seed in range(protocol.seeds)]
                for problem in problems
            ]
        )

    surfaces, T = [problem.surface or problem.name for problem in problems], protocol.trials
    return Curves(
        tuple(problem.name for problem in problems),
        tuple(surfaces.index(problem.surface or problem.name) for problem in problems),
        {label: array(label, lambda r: r.regret[:T]) for label in protocol.samplers},
        {label: array(label, lambda r: r.chosen[:T]) for label in protocol.samplers},
        {label: array(label, lambda r: r.failed / len(r.regret)) for label in protocol.samplers},
    )


def sections(problems: Sequence[Problem]) -> dict[str, list[str]]:
    """Names of problems: those of each domain, those on measured surfaces, those of each group."""
    found: dict[str, list[str]] = {}
    for problem in sorted(problems, key=lambda p: p.domain):
        found.setdefault(f"all that is {problem.domain}", []).append(problem.name)
    measured = [problem.name for problem in problems if problem.surface]
    if measured and measured not in found.values():
        found["all measured tables"] = measured
    for problem in problems:
        found.setdefault(problem.group, []).append(problem.name)
    return found


def summarise(
    protocol: Protocol, problems: Sequence[Problem], records: Mapping[Key, Record]
) -> dict[str, Any]:
    """Everything that the tables say, as JSON values."""
    all_curves = curves(protocol, problems, records)
    seconds = {
        label: float(np.mean([r.seconds for r in records.values() if r.sampler == label]))
        for label in protocol.samplers
    }
    return {
        "protocol": protocol.model_dump(),
        "reference": protocol.against,
        "after": protocol.checkpoints,
        "sections": {
            name: _section(protocol, all_curves.of(rows))
            for name, rows in sections(problems).items()
        },
        "seconds_a_study": {label: round(s, 2) for label, s in seconds.items()},
        "versions": versions(PACKAGES),
    }


def _section(protocol: Protocol, found: Curves) -> dict[str, Any]:
    reference, after = protocol.against, protocol.checkpoints
    ours, rank = found.regret[reference], statistics.ranks(found.regret)
    clusters, floor = found.clusters, protocol.floor
    samplers: dict[str, Any] = {}
    for label, curve in found.regret.items():
        said: dict[str, Any] = {
            "regret": _by_trial(after, curve, clusters),
            "chosen": {str(k): float(found.chosen[label][:, :, k - 1].mean()) for k in after},
            "rank": {str(k): float(rank[label][:, :, k - 1].mean()) for k in after},
            "failed": float(found.failed[label].mean()),
        }
        if label != reference:
            logs = statistics.log_regret(curve, floor) - statistics.log_regret(ours, floor)
            said["difference"] = _by_trial(after, curve - ours, clusters)
            said["log10_difference"] = _by_trial(after, logs, clusters)
            said["won_tied_lost"] = {
                str(k): statistics.wins(ours[:, :, k - 1], curve[:, :, k - 1]) for k in after
            }
            final = float(curve[:, :, -1].mean())
            said["reference_reaches_its_last"] = statistics.reaches(ours, final, clusters)
        samplers[label] = said
    return {
        "problems": list(found.problems),
        "surfaces": len(set(clusters)),
        "seeds": protocol.seeds,
        "samplers": samplers,
    }


def _by_trial(
    after: Iterable[int], curve: np.ndarray, clusters: Sequence[int]
) -> dict[str, statistics.Interval]:
    return {str(k): statistics.interval(curve[:, :, k - 1], clusters) for k in after}


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a page of tables."""
    reference, protocol = results["reference"], results["protocol"]
    lines = [
        f"# {protocol['name']}",
        "",
        f"{len(protocol['samplers'])} samplers, {protocol['trials']} trials a study, "
        f"{protocol['seeds']} seeds a problem. Regret of the best configuration so far, without "
        "its noise: 0 the best known, 1 the median configuration. Differences are the other "
        f"sampler's regret minus `{reference}`'s, paired by problem and seed; above 0 "
        f"`{reference}` is ahead. Brackets are 95% bootstrap intervals over problems and seeds "
        "(problems that share a measured surface count as one): one that holds 0 is a tie.",
    ]
    for name, section in results["sections"].items():
        lines += _page(name, section, reference, results["after"], protocol["floor"])
    lines += ["", "## Processor seconds of a study", ""]
    lines += table(
        ["sampler", "seconds"],
        ([f"`{label}`", f"{s:.1f}"] for label, s in results["seconds_a_study"].items()),
    )
    lines += ["", *footer(results["command"], results["versions"])]
    return "\n".join(lines)


def _page(
    name: str, section: Mapping[str, Any], reference: str, after: Sequence[int], floor: float
) -> list[str]:
    samplers, keys = section["samplers"], [str(k) for k in after]
    others = {label: found for label, found in samplers.items() if label != reference}
    count = len(section["problems"])
    lines = ["", f"## {name[0].upper()}{name[1:]}", ""]
    surfaces = section["surfaces"]
    said = f"{count} problem{'s' if count > 1 else ''}"
    said += f" over {surfaces} surfaces" if surfaces < count else ""
    lines += [f"{said}. Mean regret after trials:", ""]
    lines += table(
        ["sampler", *keys, "mean rank at the end", "failed trials"],
        (
            [
                f"`{label}`",
                *(f"{found['regret'][k]['mean']:.3f}" for k in keys),
                f"{found['rank'][keys[-1]]:.1f}",
                f"{found['failed']:.0%}",
            ]
            for label, found in samplers.items()
        ),
    )
    if not others:
        return lines
    lines += ["", "Difference of regret:", ""]
    lines += table(
        ["sampler", *keys],
        (
            [f"`{label}`", *(cell(found["difference"][k], "+.3f") for k in keys)]
            for label, found in others.items()
        ),
    )
    lines += ["", f"Difference of log10(regret + {floor:g}):", ""]
    lines += table(
        ["sampler", *keys],
        (
            [f"`{label}`", *(cell(found["log10_difference"][k], "+.2f") for k in keys)]
            for label, found in others.items()
        ),
    )
    lines += [
        "",
        f"Problems that `{reference}` won, tied (within {statistics.TIE:g}) and lost, by means "
        f"over seeds; and the trial after which its mean regret is the other's after {keys[-1]}:",
        "",
    ]
    lines += table(
        ["sampler", *keys, f"reaches its {keys[-1]}"],
        (
            [
                f"`{label}`",
                *(" / ".join(map(str, found["won_tied_lost"][k])) for k in keys),
                _reached(found["reference_reaches_its_last"], int(keys[-1])),
            ]
            for label, found in others.items()
        ),
    )
    return lines


def _reached(found: Sequence[int | None], last: int) -> str:
    best, low, high = (f"> {last}" if k is None else str(k) for k in found)
    return f"{best} [{low}, {high}]"
