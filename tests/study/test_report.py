"""What is left to look at: the report, and what the dashboard shows."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree

import pytest
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts import get_all_artifact_meta

from optuna_lora_rl.finetuning.errors import FineTuningError
from optuna_lora_rl.study import charts
from optuna_lora_rl.study import dashboard
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import report
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import trials
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner


def test_the_report_stands_alone_and_tells_the_best(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    paper.failures = [FineTuningError("diverged", "the loss <is> not finite")]
    spec = make_spec({"budget": 14})
    study = runner.run(spec).study
    page = (spec.folder / "report.html").read_text()
    assert page.count("<svg") >= 3 and "Which parameters matter" in page
    best = page.partition("<h2>The best configuration</h2>")[2].partition("<pre>")[0]
    tuned, _, others = best.partition("<summary>Not tuned</summary>")
    assert "<td>lora_rank</td>" in tuned and "<td>use_dora</td>" not in tuned
    assert "<td>use_dora</td>" in others and "<td>lora_rank</td>" not in others
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert f"{study.best_value:.4f}" in page
    assert "the loss &lt;is&gt; not finite" in page and "<script" not in page


def test_a_chart_is_valid_svg() -> None:
    picture = charts.chart(
        [
            charts.Series(
                [(0, 1.0), (1, float("nan")), (2, 3.0)], dots=True, titles=["<a>", "", "b"]
            )
        ],
        x="step & time",
        y="loss",
    )
    root = ElementTree.fromstring(picture)
    assert len(root.findall("{*}circle")) == 2
    assert charts.chart([charts.Series([])], x="x", y="y") == ""
    assert "path" in charts.chart([charts.Series([(1, 5.0)])], x="x", y="y")


def test_whole_numbers_have_whole_ticks() -> None:
    def ticks(*across: float) -> list[str]:
        picture = charts.chart([charts.Series([(x, 0.3) for x in across])], x="trial", y="score")
        return re.findall(r'text-anchor="middle" fill="#334155">([-.\d]+)</text>', picture)

    assert ticks(0, 1, 2) == ["0", "1", "2"]
    assert ticks(0) == ["0"]
    assert ticks(0, 19) == ["0", "5", "10", "15"]
    assert ticks(0, 0.4) == ["0", "0.1", "0.2", "0.3", "0.4"]


def test_the_dashboard_has_names_notes_artifacts_and_a_figure(
    paper: type[PaperTuner], make_spec: MakeSpec
) -> None:
    pytest.importorskip("optuna_dashboard")
    from optuna_dashboard import get_note

    spec = make_spec()
    study = runner.run(spec).study
    assert study.metric_names == ["score"]
    assert f"Best: trial {study.best_trial.number}" in get_note(study)
    attrs = study._storage.get_study_system_attrs(study._study_id)
    assert any(f"dashboard:{study.best_trial._trial_id}:note_str" in key for key in attrs)
    assert any(dashboard.FIGURE_ID in key for key in attrs)
    meta = get_all_artifact_meta(study.best_trial, storage=study._storage)
    assert {entry.filename for entry in meta} == {"adapter_config.json", "loss.svg"}
    store = FileSystemArtifactStore(str(dashboard.artifact_folder(spec.folder)))
    curve = next(entry for entry in meta if entry.filename == "loss.svg")
    assert store.open_reader(curve.artifact_id).read().startswith(b"<svg")


def test_ranks_and_cuts_are_shown(
    paper: type[PaperTuner], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes, keep = trials._attributes, layers.keep
    cut = {
        "quality_before": 0.5,
        "quality_after": 0.4375,
        "parameters_before": 4000,
        "parameters_after": 1000,
        "largest_rank": 3,
        "largest_error": 0.1,
    }
    ranks = {"layers.0.<up>": 3, "layers.1.<up>": 1}
    reason = "the loss stands still: it fell by 0.1 <%>"
    change = {"step": 2, "layer": "layers.0.<up>", "before": 2, "after": 3, "reason": reason}
    monkeypatch.setattr(
        trials,
        "_attributes",
        lambda result: attributes(dataclasses.replace(result, truncation=cut)),
    )
    known = {"ranks": ranks, "rank_changes": [change]}
    monkeypatch.setattr(
        layers,
        "keep",
        lambda folder, number, result: keep(folder, number, dataclasses.replace(result, **known)),
    )
    spec = make_spec()
    study = runner.run(spec).study
    assert study.best_trial.user_attrs["truncation"] == cut
    page = (spec.folder / "report.html").read_text()
    assert "layers.0.&lt;up&gt;" in page and "0.5000</td><td>0.4375" in page
    assert "2 → 3" in page and "fell by 0.1 &lt;%&gt;" in page
    facts = report.best_facts(study, spec)
    assert facts is not None and facts["rank_changes"] == [change]
    assert facts["ranks"] == ranks and facts["truncation"] == cut
