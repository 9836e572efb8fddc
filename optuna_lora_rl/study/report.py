"""What a study found: the facts of its best trial, and a report as one HTML file."""

from __future__ import annotations

import html
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import optuna
from optuna.trial import TrialState

from optuna_lora_rl.errors import masked
from optuna_lora_rl.study import answers
from optuna_lora_rl.study import charts
from optuna_lora_rl.study import data_report
from optuna_lora_rl.study import front
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import output
from optuna_lora_rl.study import rank_report
from optuna_lora_rl.study import verdict
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.owner import OWNER

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from optuna_lora_rl.study.spec import StudySpec

FILE = "report.html"
UNTUNED = "untuned"
TEST = "test"
# On what, and in which arithmetic, its workers have trained.
DEVICES = "devices"
# Attributes of a trial that say how it went, rather than how well.
_BOOKKEEPING = {
    OWNER,
    "configuration",
    "curve",
    "truncation",
    *layers.HELD,
    layers.ATTRIBUTE,
    "source",
    outcome.RETRY_OF,
    outcome.TURN,
    outcome.PACKED,
    outcome.ALONE,
    outcome.GUIDES,
}


def best_facts(study: optuna.Study, spec: StudySpec) -> dict[str, Any] | None:
    """Everything known of the best trial, as JSON values, or None where there is none."""
    best = outcome.best_of(study.get_trials(deepcopy=False))
    return None if best is None else facts(study, spec, best)


def facts(study: optuna.Study, spec: StudySpec, trial: FrozenTrial) -> dict[str, Any]:
    """Everything known of a trial, as JSON values."""
    known = {
        "study": study.study_name,
        "trial": trial.number,
        "model": spec.model.name,
        "data": spec.data.train,
        "score": outcome.final_score(trial),
        "configuration": trial.user_attrs.get("configuration", trial.params),
        "params": trial.params,
        "source": trial.user_attrs.get("source"),
        "metrics": {k: v for k, v in trial.user_attrs.items() if k not in _BOOKKEEPING},
        **_of_layers(trial, spec),
        UNTUNED: study.user_attrs.get(UNTUNED, {}),
    }
    test = study.user_attrs.get(TEST, {})
    if test.get("trial") == trial.number and len(test) > 1:
        known[TEST] = {name: value for name, value in test.items() if name != "trial"}
    answered = answers.of(study, trial)
    if answered:
        known[answers.ANSWERS] = {k: v for k, v in answered.items() if k != "wanted"}
    return known


def _of_layers(trial: FrozenTrial, spec: StudySpec) -> dict[str, Any]:
    known = layers.read(trial, spec.folder)
    found = {
        "ranks": known.ranks,
        "rank_changes": known.rank_changes,
        "truncation": trial.user_attrs.get("truncation"),
        "note": known.missing,
    }
    return {name: value for name, value in found.items() if value}


def side_by_side(study: optuna.Study, best: FrozenTrial) -> dict[str, Mapping[str, Any]]:
    """What is known of the untuned model, of the guides' configuration and of the best adapter.

    By the words of a column's head; that of the test split last, where there is one.
    """
    columns: dict[str, Mapping[str, Any]] = {"untuned": study.user_attrs.get(UNTUNED, {})}
    guides = outcome.guides_of(study.get_trials(deepcopy=False))
    is_guides = guides is not None and guides.number == best.number
    if guides is not None and not is_guides:
        columns[f"guides (trial {guides.number})"] = guides.user_attrs
    columns["best adapter (the guides')" if is_guides else "best adapter"] = best.user_attrs
    test = study.user_attrs.get(TEST, {})
    has_test = test.get("trial") == best.number and len(test) > 1
    return columns | ({"on the test split": test} if has_test else {})


def measured(study: optuna.Study, best: FrozenTrial) -> list[str]:
    """The metrics that both the untuned model and the best adapter have."""
    untuned = study.user_attrs.get(UNTUNED, {})
    return [name for name in untuned if name in best.user_attrs and name != "quality"]


def top(trials: Iterable[FrozenTrial], number: int) -> list[FrozenTrial]:
    """The completed trials with the highest scores, best first."""
    return outcome.ranked(trials)[:number]


def write(study: optuna.Study, spec: StudySpec, *, lost: str = "") -> Path:
    """Writes ``report.html`` into the output folder; it needs no other file and no network.

    Args:
        study: The study.
        spec: Its file.
        lost: Why the best trial's adapter is not there; empty where it is.
    """
    # It takes torch, which those who only ask how a study stands need not wait for.
    from optuna_lora_rl.study import explaining

    trials = study.get_trials(deepcopy=False)
    facts, best = best_facts(study, spec), outcome.best_of(trials)
    parts = [_opening(study, spec, trials), _shortfall(study)]
    known = study.user_attrs.get(data_report.DATA)
    examples = data_report.section(known) if known else ""
    if facts is None or best is None:
        parts.append(examples)
    else:
        parts += [
            _cards(facts),
            _compared(study, best),
            answers.section(study, best),
            _best(facts, spec, lost),
            front.section(study, spec),
            examples,
            rank_report.section(best, spec),
            _figures(trials, facts["trial"], spec),
            explaining.section(study, spec),
            _table(trials, spec),
            rank_report.truncations(top(trials, len(trials))),
        ]
    parts.append(_failures(trials))
    path = spec.folder / FILE
    page = _PAGE.format(title=html.escape(spec.name), body="\n".join(filter(None, parts)))
    output.write(path, page)
    return path


def _opening(study: optuna.Study, spec: StudySpec, trials: Sequence[FrozenTrial]) -> str:
    counts = outcome.counts_in_words(trials)
    where = " and ".join(study.user_attrs.get(DEVICES, []))
    packed = outcome.side_by_side(trials)
    return (
        f"<h1>{html.escape(spec.name)}</h1><p class=quiet><b>{html.escape(spec.model.name)}</b> "
        f"on <b>{html.escape(spec.data.train)}</b> · sampler {spec.sampler.name} · pruner "
        f"{spec.pruner.name} · {', '.join(counts) or 'no trials yet'}"
        f"{f' · {html.escape(packed)}' if packed else ''}"
        f"{f' · trained on {html.escape(where)}' if where else ''}</p>"
        f"<p class=quiet>Score = quality − {spec.objective.cost_weight:g} × cost. Quality is "
        f"what {spec.objective.metric} gained over the untuned model; a cost of 1 is one run of "
        f"the reference configuration ({spec.objective.cost_source}).</p>"
    )


def _shortfall(study: optuna.Study) -> str:
    sentence = verdict.shortfall(study)
    return f"<p class=warning>Mind: {html.escape(sentence)}.</p>" if sentence else ""


def _cards(facts: dict[str, Any]) -> str:
    metrics, untuned = facts["metrics"], facts[UNTUNED]
    cards = [("score", wording.score(facts["score"])), ("trial", str(facts["trial"]))]
    cards += [(k, f"{metrics[k]:.3f}") for k in ("quality", "cost") if k in metrics]
    if "loss" in metrics:
        before = f"{untuned['loss']:.3f} → " if "loss" in untuned else ""
        cards.append(("validation loss", f"{before}{metrics['loss']:.3f}"))
    if "trainable_parameters" in metrics:
        cards.append(("parameters", wording.count(metrics["trainable_parameters"])))
    cards += [(f"test {k.replace('_', ' ')}", f"{v:.3f}") for k, v in facts.get(TEST, {}).items()]
    inner = "".join(f"<div><b>{v}</b><span>{html.escape(k)}</span></div>" for k, v in cards)
    return f"<div class=cards>{inner}</div>"


def _best(facts: dict[str, Any], spec: StudySpec, lost: str) -> str:
    tuned = {name.removesuffix("_ratio") for name in facts["params"]} | set(facts["params"])
    rows = {True: "", False: ""}
    for name, value in facts["configuration"].items():
        cells = (html.escape(name), html.escape(wording.number(value)))
        rows[name in tuned] += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    others = f"<details><summary>Not tuned</summary><table>{rows[False]}</table></details>"
    code = (
        "from peft import AutoPeftModelForCausalLM\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{spec.folder / "best"}")'
    )
    adapter = f"<p class=quiet>Its adapter is in PEFT format:</p><pre>{html.escape(code)}</pre>"
    if lost:
        adapter = f"<p><b>Note:</b> {html.escape(lost)}.</p>"
    return f"<h2>The best configuration</h2><table>{rows[True]}</table>{others}{adapter}"


def _compared(study: optuna.Study, best: FrozenTrial) -> str:
    columns, metrics = side_by_side(study, best), measured(study, best)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in ("validation", *columns))
    rows = ""
    for metric in metrics:
        cells = "".join(
            f"<td>{known[metric]:.3f}</td>" if metric in known else "<td></td>"
            for known in columns.values()
        )
        rows += f"<tr><td>{html.escape(metric.replace('_', ' '))}</td>{cells}</tr>"
    return f"<h2>Before and after</h2><table><tr>{heads}</tr>{rows}</table>" if rows else ""


def _figures(trials: Sequence[FrozenTrial], best: int, spec: StudySpec) -> str:
    scored = [(t, s) for t in trials if (s := outcome.final_score(t)) is not None]
    complete = [(t, s) for t, s in scored if t.state == TrialState.COMPLETE]
    incumbent, highest = [], float("-inf")
    for trial, score in complete:
        highest = max(highest, score)
        incumbent.append((float(trial.number), highest))
    history = charts.chart(
        [
            charts.Series(
                [(float(t.number), s) for t, s in scored],
                color="#94a3b8",
                line=False,
                dots=True,
                titles=[f"trial {t.number}: {outcome.configuration(t)}" for t, _ in scored],
            ),
            charts.Series(incumbent, steps=True),
        ],
        x="trial",
        y="score, and the best so far",
    )
    curves = charts.chart(
        [*(_curve(t, best=False) for t in trials if t.number != best)]
        + [_curve(t, best=True) for t in trials if t.number == best],
        x="optimizer step",
        y="validation loss",
    )
    priced = [t for t, _ in complete if {"quality", "cost"} <= t.user_attrs.keys()]
    trade = charts.chart(
        [
            _trade([t for t in priced if (t.number == best) is chosen], best=chosen)
            for chosen in (False, True)
        ],
        x=f"cost (1 = reference run, {spec.objective.cost_source})",
        y="quality",
    )
    titled = (
        ("Scores", history),
        ("Loss curves, the best in colour", curves),
        ("Quality against cost", trade),
    )
    return "".join(f"<h2>{title}</h2>{picture}" for title, picture in titled if picture)


def _curve(trial: FrozenTrial, *, best: bool) -> charts.Series:
    rows = trial.user_attrs.get("curve", [])
    points = [(float(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
    color, width = (charts.ACCENT, 3.0) if best else (charts.QUIET, 1.2)
    return charts.Series(points, color=color, width=width)


def _trade(trials: Sequence[FrozenTrial], *, best: bool) -> charts.Series:
    return charts.Series(
        [(t.user_attrs["cost"], t.user_attrs["quality"]) for t in trials],
        color=charts.ACCENT if best else "#94a3b8",
        line=False,
        dots=True,
        titles=[outcome.configuration(t) for t in trials],
    )


def _table(trials: Sequence[FrozenTrial], spec: StudySpec) -> str:
    columns = ("quality", "cost", "loss", "trainable_parameters", "seconds")
    titles = ("trial", "score", *columns[:3], "parameters", "time")
    heads = "".join(f"<th>{title}</th>" for title in titles)
    rows = ""
    for trial in top(trials, 20):
        attrs = trial.user_attrs
        cells = [str(trial.number), wording.score(outcome.final_score(trial))]
        cells += [_cell(k, attrs[k]) if k in attrs else "–" for k in columns]
        cells.append(outcome.configuration(trial))
        rows += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    return f"<h2>The best trials</h2><table class=wide><tr>{heads}<th></th></tr>{rows}</table>"


def _cell(column: str, value: float) -> str:
    if column == "seconds":
        return wording.duration(value)
    return wording.count(value) if column == "trainable_parameters" else wording.number(value)


def _failures(trials: Sequence[FrozenTrial]) -> str:
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    rows = "".join(
        f"<tr><td>{t.number}</td><td>{html.escape(outcome.failure(t) or 'not known')}</td>"
        f"<td>{html.escape(masked(str(t.user_attrs.get(outcome.MESSAGE, ''))))}</td>"
        f"<td>{html.escape(outcome.configuration(t))}</td></tr>"
        for t in failed
    )
    return f"<h2>Failed trials</h2><table class=wide>{rows}</table>" if rows else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1e293b; max-width: 860px;
  margin: 40px auto; padding: 0 20px; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 40px; font-size: 18px; }}
.quiet {{ color: #64748b; margin: 4px 0; }}
.warning {{ color: #b91c1c; font-weight: 600; }}
.cards {{ display: flex; flex-wrap: wrap; gap: 12px; margin-top: 24px; }}
.cards div {{ background: #f1f5f9; border-radius: 8px; padding: 12px 18px; }}
.cards b {{ display: block; font-size: 20px; }} .cards span {{ color: #64748b; }}
table {{ border-collapse: collapse; }} table.wide {{ width: 100%; }}
td, th {{ text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid #e2e8f0;
  font-variant-numeric: tabular-nums; }}
pre {{ background: #f1f5f9; border-radius: 8px; padding: 12px 18px; overflow-x: auto; }}
table.answers td {{ white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; }}
td.right {{ color: #0f766e; font-weight: 600; }}
.panels {{ display: grid; grid-template-columns: 1fr 1fr; gap: 16px 24px; margin-top: 12px; }}
.bar {{ background: #0f766e; height: 10px; border-radius: 3px; min-width: 1px; }}
</style></head><body>
{body}
</body></html>
"""
