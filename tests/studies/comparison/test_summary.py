"""Tables and figures of a comparison."""

from __future__ import annotations

from dataclasses import replace

from studies.comparison import figures
from studies.comparison import summary
from studies.comparison.problems import build
from studies.comparison.running import Record
from tests.studies.comparison.test_running import protocol

PROTOCOL = protocol(
    samplers={"rl": None, "tpe": None},
    problems={"functions": {"families": ["sphere"], "dimensions": [2, 5]}},
    after=[2, 4],
)
CURVES = {"rl": [0.5, 0.2, 0.1, 0.1], "tpe": [0.9, 0.9, 0.3, 0.2]}
PROBLEMS = build(PROTOCOL.problems)
RECORDS = {
    (label, problem.name, seed): Record(
        label, problem.name, seed, "", [r + 0.1 * seed for r in curve], curve, 1, 2.0
    )
    for label, curve in CURVES.items()
    for problem in PROBLEMS
    for seed in range(2)
}


def test_differences_are_paired_and_said_from_the_reference() -> None:
    results = summary.summarise(PROTOCOL, PROBLEMS, RECORDS)
    tpe = results["sections"]["all that is not LoRA"]["samplers"]["tpe"]
    difference = tpe["difference"]["2"]
    assert {name: round(value, 6) for name, value in difference.items()} == {
        "mean": 0.7,
        "low": 0.7,
        "high": 0.7,
    }
    assert tpe["won_tied_lost"]["4"] == (2, 0, 0)
    assert tpe["reference_reaches_its_last"][0] == 2
    assert results["seconds_a_study"] == {"rl": 2.0, "tpe": 2.0}


def test_a_lower_floor_tells_small_regrets_apart() -> None:
    found = {}
    for floor in (0.01, 0.0001):
        own = PROTOCOL.model_copy(update={"floor": floor})
        tiny = {
            key: replace(record, regret=[r / 1000 for r in record.regret])
            for key, record in RECORDS.items()
        }
        results = summary.summarise(own, PROBLEMS, tiny) | {"command": ""}
        assert f"Difference of log10(regret + {floor:g}):" in summary.markdown(results)
        samplers = results["sections"]["all that is not LoRA"]["samplers"]
        found[floor] = samplers["tpe"]["log10_difference"]["2"]["mean"]
    assert 0 < found[0.01] < 0.05 < found[0.0001]


def test_measured_surfaces_have_a_section_of_their_own() -> None:
    measured = replace(PROBLEMS[0], name="table", surface="task")
    sections = summary.sections([measured, *PROBLEMS])
    assert sections["all measured tables"] == ["table"]
    assert "all measured tables" not in summary.sections([measured])
    assert "all measured tables" not in summary.sections(PROBLEMS)


def test_the_page_has_a_row_for_every_sampler_and_the_command() -> None:
    results = summary.summarise(PROTOCOL, PROBLEMS, RECORDS) | {"command": "compare it"}
    page = summary.markdown(results)
    assert "| `rl` | 0.250 | 0.150 | 1.0 | 25% |" in page
    assert "| `tpe` | +0.700 [+0.700, +0.700] |" in page
    assert "`compare it`" in page and "optuna 5" in page


def test_the_figures_need_no_network() -> None:
    curves = summary.curves(PROTOCOL, PROBLEMS, RECORDS)
    sections = summary.sections(PROBLEMS)
    page = figures.page("short", curves, sections, "rl", [2, 4])
    assert "cdn.plot.ly" not in page.split("<body>")[1].split("<h1>")[0]
    assert 'src="http' not in page
    for word in ("tpe", "sphere-5d-0", "after 4", "BBOB-like, 2 dimensions (1 problem)"):
        assert word in page
