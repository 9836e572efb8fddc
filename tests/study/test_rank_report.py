"""What ``optuna-lora-rl report`` says of a trial's layers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from rich.console import Console

from optuna_lora_rl import cli
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.study import rank_report
from tests.study.conftest import MakeSpec


def layer(name: str, **values: Any) -> dict[str, Any]:
    usual = {"rank": 4, "parameters": 100, "weight_norm": 1.5, "weight_trend": 0.04}
    return {"layer": name, **usual, "gradient_norm": 0.25, "gradient_trend": -0.1, **values}


READ = {
    "course": [
        {"step": step, "weight_norm": step / 10, "gradient_norm": 1.0, "parameters": 200}
        for step in (0, 5)
    ],
    "layers": [layer("model.layers.0.q_proj"), layer("model.layers.1.q_proj", rank=6)],
    "suggestions": [
        {"layer": "model.layers.0.q_proj", "concern": "unstable", "text": "too <fast>"},
        {"layer": "model.layers.1.q_proj", "concern": "unstable", "text": "too <fast>"},
    ],
}
CHANGE = {"step": 4, "layer": "model.layers.1.q_proj", "before": 4, "after": 6, "reason": "slow"}


def completed(**attributes: Any) -> FrozenTrial:
    trial = optuna.trial.create_trial(
        value=0.5, user_attrs={"score": 0.5, "quality": 0.6, "configuration": {}, **attributes}
    )
    trial.number = 3
    return trial


def shown(trial: FrozenTrial, make_spec: MakeSpec, changes: Any = None) -> str:
    output = io.StringIO()
    rank_report.show(Console(file=output, width=120), trial, make_spec(changes))
    return " ".join(output.getvalue().split())


def curve(train: list[float], evaluated: list[float]) -> list[dict[str, float]]:
    pairs = zip(train, evaluated, strict=True)
    return [{"step": i, "train_loss": t, "loss": e} for i, (t, e) in enumerate(pairs)]


def test_layers_changes_and_suggestions_are_told(make_spec: MakeSpec) -> None:
    cut = {"quality_before": 0.61, "quality_after": 0.6, "largest_rank": 2}
    cut |= {"parameters_before": 200, "parameters_after": 50}
    said = shown(completed(monitor=READ, rank_changes=[CHANGE], truncation=cut), make_spec)
    assert "Trial 3 (complete, score 0.5000)" in said and "model.layers.…" in said
    assert "1.q_proj 6 100 1.5 +4% 0.25 -10%" in said
    assert "4 model.layers.1.q_proj 4 → 6 slow" in said
    assert "200 parameters became 50, quality 0.6100 became 0.6000" in said
    assert "- unstable, model.layers.0.q_proj and 1 more: too <fast>" in said


def test_losses_that_part_are_overfitting(make_spec: MakeSpec) -> None:
    rows = curve([1, 0.9, 0.8, 0.7], [1, 1, 1.1, 1.2])
    trial = completed(monitor=READ, curve=rows)
    full = {"training.first_evaluation": 1.0}
    assert "- overfitting: the training loss fell by 30.0%" in shown(trial, make_spec, full)
    # Of growing validation sets the losses do not compare, as older versions recorded them.
    assert "overfitting" not in shown(trial, make_spec)
    # What is left of the untuned model's loss does: here the last examples are the harder ones.
    for row, untuned in zip(rows, [2, 2, 2.2, 2.4], strict=True):
        row["untuned_loss"] = untuned
    assert "overfitting" not in shown(completed(monitor=READ, curve=rows), make_spec)
    for row in rows:
        row["untuned_loss"] = 2.0
    assert "- overfitting" in shown(completed(monitor=READ, curve=rows), make_spec)


def test_where_nothing_was_read_it_says_why(make_spec: MakeSpec) -> None:
    older = completed(ranks={"q_proj": 7})
    said = shown(older, make_spec)
    assert "of an older version" in said and "q_proj 7" in said
    assert "training.monitor is 0" in shown(older, make_spec, {"training.monitor": 0})
    pruned = completed()
    pruned.state = TrialState.PRUNED
    said = shown(pruned, make_spec)
    assert "only completed trials keep" in said and "rank" not in said


def test_the_command_reports_a_real_study(
    study_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file({"budget": 1, "space.rank_change": "gradient"})
    with pytest.raises(SystemExit):
        cli.main(["run", str(file), "--plain"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(file)])
    said = capsys.readouterr().out
    assert not ended.value.code
    assert "Medians over the layers" in said and "0.self_attn.q_proj" in said
    page = (file.parent / "out" / "report.html").read_text()
    assert "Its layers in training" in page and "Layer by layer" in page
    with pytest.raises(SystemExit) as failed:
        cli.main(["report", str(file), "--trial", "9"])
    assert failed.value.code == 2 and "trial 9 does not exist" in capsys.readouterr().err


def test_the_page_escapes_what_it_quotes(make_spec: MakeSpec) -> None:
    page = rank_report.section(completed(monitor=READ, rank_changes=[CHANGE]), make_spec())
    assert "too &lt;fast&gt;" in page and "How they changed in training" in page
    assert "<details open><summary>Changes: " in page
    assert page.count("<svg") == 2


def many(layers: int = 210) -> dict[str, Any]:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{i // 7}.{kinds[i % 7]}" for i in range(layers)]
    rows = [layer(name, rank=2 + (i // 7) % 10) for i, name in enumerate(names)]
    told = [
        {"layer": names[7 * i], "concern": "large gradient", "text": f"it is {i + 3}.5 times"}
        for i in (0, 1, 2, 9)
    ]
    return {"course": READ["course"], "layers": rows, "suggestions": told}


def test_many_layers_are_summed_up_by_kind_and_range_of_blocks(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    read = many()
    changes = [
        {
            "step": 4,
            "layer": row["layer"],
            "before": 4,
            "after": 6 + place % 2,
            "reason": f"by {place}%",
        }
        for place, row in enumerate(read["layers"][:70:7])
    ]
    trial = completed(monitor=read, rank_changes=changes)
    said = shown(trial, make_spec)
    assert "q_proj 0-9 7 (2…11) 1 k 1.5 +4% 0.25 -10%" in said
    assert "down_proj 20-29 7 (2…11)" in said and "model.layers" not in said
    assert "- large gradient, q_proj of blocks 0-2 and 9: it is 3.5 to 12.5 times" in said
    assert "4 q_proj of blocks 0-9 4 → 7 (6…7) by 0 to 9%" in said
    page = rank_report.section(trial, make_spec())
    assert page.count("<tr>") < 40 and "<td>7 (2…11)</td>" in page
    # All of them for who asks.
    whole = io.StringIO()
    rank_report.show(Console(file=whole, width=120), trial, make_spec(), whole=True)
    assert whole.getvalue().count("q_proj") == 30 + 10 + 1
    rank_report.write_csv(tmp_path / "layers.csv", trial, make_spec())
    rows = (tmp_path / "layers.csv").read_text().splitlines()
    assert len(rows) == 211 and rows[0].startswith("layer,block,module,rank,parameters")
    assert rows[8].startswith("model.layers.1.q_proj,1,q_proj,3,100,1.5,0.04,0.25,-0.1")
    # As many as people read one by one are shown as ever.
    assert "9.q_proj 11" in shown(completed(monitor=many(64)), make_spec)


def test_a_csv_of_nothing_says_why(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--csv: Nothing was read.*older version"):
        rank_report.write_csv(tmp_path / "layers.csv", completed(), make_spec())


def test_a_trend_that_rounds_to_nothing_has_no_sign() -> None:
    assert [rank_report._trend(share) for share in (-0.004, 0.004, 0.05, -0.05)] == [
        *("0%", "0%"),
        *("+5%", "-5%"),
    ]
