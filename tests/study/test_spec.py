"""What a study's file means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from optuna_lora_rl import pruners
from optuna_lora_rl import samplers
from optuna_lora_rl.study import reference
from optuna_lora_rl.study import spec as study_spec
from optuna_lora_rl.study.spec import StudySpec
from optuna_lora_rl.vocabulary import OWN_INITIALISATIONS

ROOT = Path(__file__).parents[2]


def test_one_line_says_what_matters(tmp_path: Path) -> None:
    (tmp_path / "dates.yaml").write_text("data: tiny:dates-small\n")
    spec = study_spec.load(tmp_path / "dates.yaml", ["sampler=tpe", "budget=7"])
    assert spec.name == "dates" and spec.model.name == "tiny"
    assert spec.data.train == "tiny:dates-small"
    assert spec.sampler.name == "tpe" and spec.budget.trials == 7
    assert spec.folder == Path("runs/dates")
    assert spec.storage_url == "sqlite:///runs/dates/study.db"
    assert {"lora_rank", "learning_rate"} <= set(spec.lora_space().distributions())


def test_a_sampler_takes_its_own_options(study_file: Callable[..., Path]) -> None:
    spec = study_spec.load(study_file({"sampler": {"name": "tpe", "n_startup_trials": 3}}))
    assert spec.sampler.options == {"n_startup_trials": 3} and spec.sampler.seed == 0


def test_every_sampler_and_pruner_can_be_named() -> None:
    named = {key.name: key.values for key in reference.keys(study_spec.SamplerChoice)}
    assert all(f"`{name}`" in named["name"] for name in samplers.NAMES)
    named = {key.name: key.values for key in reference.keys(study_spec.PrunerChoice)}
    assert all(f"`{name}`" in named["name"] for name in pruners.NAMES)


def test_every_key_is_described() -> None:
    def check(model: type) -> None:
        for key in reference.keys(model):
            assert len(key.description) > 15, key.name
            if key.section:
                check(key.section)

    check(StudySpec)


def test_the_committed_reference_is_up_to_date() -> None:
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == reference.markdown(), (
        "run: python -m optuna_lora_rl.study.reference > docs/configuration.md"
    )


def test_the_file_that_init_writes_is_valid_and_complete(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    reference.write_commented(file, model="tiny", train="tiny:dates-small", trials=7, force=False)
    spec = study_spec.load(file)
    assert spec.name == "mine" and spec.budget.trials == 7
    text = file.read_text()
    for key in reference.keys(StudySpec):
        for inner in reference.keys(key.section) if key.section else [key]:
            assert f"{inner.name}:" in text


def test_what_init_leaves_commented_out_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    reference.write_commented(file, model="tiny", train="tiny:dates-small", trials=7, force=False)
    before = study_spec.load(file)
    # A commented key is "# key: value"; everything else in a comment is a sentence.
    keys = {inner.name for key in reference.keys(StudySpec) if key.section
            for inner in reference.keys(key.section)}  # fmt: skip
    lines = []
    for line in file.read_text().splitlines():
        bare = line.lstrip(" ").removeprefix("# ")
        is_key = line.startswith("  # ") and bare.split(":")[0] in keys and ": " in bare
        lines.append("  " + bare if is_key else line)
    file.write_text("\n".join(lines))
    assert study_spec.load(file) == before


def test_the_quickstart_is_valid() -> None:
    spec = study_spec.load(ROOT / "studies" / "quickstart.yaml")
    assert spec.sampler.name == "rl" and spec.budget.trials == 20


def test_the_example_of_ranks_is_what_its_page_shows() -> None:
    spec = study_spec.load(ROOT / "studies" / "ranks.yaml")
    page = (ROOT / "docs" / "rank.md").read_text()
    tuned = spec.lora_space().distributions()
    assert {"rank_allocation", "rank_change", "truncate_energy", "init_lora_weights"} <= set(tuned)
    shown = yaml.safe_load(page.split("```yaml")[1].split("```")[0])["space"]
    written = yaml.safe_load((ROOT / "studies" / "ranks.yaml").read_text())["space"]
    assert shown.items() <= written.items()
    for name in OWN_INITIALISATIONS:
        assert f"`{name}`" in page
