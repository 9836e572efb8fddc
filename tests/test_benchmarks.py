"""The benchmarks in ``studies/``, with few trials of few steps."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from optuna_lora_rl.space import LoraSpace

STUDIES = Path(__file__).resolve().parents[1] / "studies"
SMALL = ["--steps", "2", "--evaluations", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def studies() -> Iterator[Any]:
    """Imports the scripts by name, as they import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module


@pytest.fixture
def launched(studies: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Lets workers work in this process, and lists their jobs."""
    import torch

    jobs: list[dict[str, Any]] = []

    def launch(file: str, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        jobs.extend(own)
        prepare = studies(Path(file).stem).prepare
        return [json.loads(json.dumps(prepare(json.loads(json.dumps(job)))())) for job in own]

    monkeypatch.setattr(studies("measuring"), "launch", launch)
    threads = torch.get_num_threads()
    yield jobs
    torch.set_num_threads(threads)


def test_the_naive_arm_tunes_the_same_space(studies: Any) -> None:
    naive, benchmark = studies("naive"), studies("compute_to_target")
    space = LoraSpace(benchmark.SPACE | {"max_steps": 40})
    for seed in range(3):
        asked = [
            optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed)).ask()
            for _ in range(2)
        ]
        own, ours = naive.suggest(asked[0], 40), space.suggest(asked[1])
        assert own == {name: ours[name] for name in own}
        assert asked[0].distributions == asked[1].distributions


def test_throughput_measures_equal_work(
    studies: Any, launched: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = [
        *SMALL,
        "--naive-threads",
        "1",
        "--trials",
        "2",
        "--validation",
        "8",
        "--repeats",
        "1",
        "--sets",
        "mixed",
    ]
    command += ["--sizes", "2", "--pairs", "2", "--device", "cpu", "--output", str(tmp_path)]
    command += ["--records", str(tmp_path / "records.jsonl")]
    studies("throughput").main(command)
    (entry,) = json.loads((tmp_path / "throughput.json").read_text()).values()
    arms = entry["sets"]["mixed"]["arms"]
    assert list(arms) == [
        "naive",
        "naive, 1 thread",
        "naive, TRL's defaults",
        "shared base",
        "shared base, growing evaluations",
        "packed 2",
        "naive x2",
        "shared base x2",
        "shared base, growing evaluations x2",
        "packed 2 x2",
    ]
    # Smaller evaluation batches are averaged in another way.
    equal = [row for name, row in arms.items() if name != "naive, TRL's defaults"]
    assert all(row["largest_loss_difference"] < 1e-4 for row in equal)
    assert not any(row["notes"] for row in arms.values())
    shares = [job["numbers"] for job in launched if job["kind"] == "packed"]
    assert shares == [[0, 1], [0], [1]]
    assert "| packed 2 x2 |" in (tmp_path / "throughput.md").read_text()
    launched.clear()
    studies("throughput").main(command)
    assert not launched


def test_compute_to_target_adds_one_part_after_another(
    studies: Any, launched: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = [*SMALL, "--trials", "2", "--size", "2", "--seeds", "1"]
    command += ["--tasks", "units-small", "--training", '{"early_stopping_patience": 1}']
    command += ["--output", str(tmp_path), "--records", str(tmp_path / "records.jsonl")]
    studies("compute_to_target").main(command)
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    results = {line["key"]["arm"]: line["result"] for line in lines}
    assert list(results) == ["naive", "shared base", "sampler", "pruner", "options", "packing"]
    naive, shared = results["naive"], results["shared base"]
    # The same sampler gets the same scores for the same configurations, and so goes the same way.
    assert shared["reached"]
    assert shared["tokens"] == studies("compute_to_target_tables").first_hit(naive)["tokens"]
    # TRL's own loss is a mean over batches, ours one over tokens.
    assert shared["best"] == pytest.approx(naive["best"], abs=5e-3)
    assert all(0 < result["tokens"] <= result["padded_tokens"] for result in results.values())
    page = (tmp_path / "compute_to_target.md").read_text()
    assert all(f"| {name} |" in page for name in results)
    launched.clear()
    studies("compute_to_target").main(command)
    assert not launched


def test_fronts_run_once_and_compare_all_samplers(
    studies: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--trials", "12", "--seeds", "2", "--dimensions", "2"]
    command += ["--tables", "tiny/cipher-ample", "--output", str(tmp_path)]
    command += ["--records", str(tmp_path / "records.jsonl")]
    benchmark = studies("fronts")
    benchmark.main(command)
    record = json.loads((tmp_path / "fronts.json").read_text())
    assert list(record["problems"]) == ["tiny-cipher-ample", "zdt1-2d", "zdt2-2d", "zdt3-2d"]
    for found in record["curves"].values():
        for volumes in found.values():
            assert np.shape(volumes) == (2, 12)
            assert (np.diff(volumes) >= 0).all() and 0 <= np.min(volumes) <= np.max(volumes) < 1.01
    group = record["groups"]["ZDT"]
    behind = group["rl"]["hypervolume"]["12"]["mean"] - group["gp"]["hypervolume"]["12"]["mean"]
    assert group["gp"]["behind"]["12"]["mean"] == pytest.approx(behind)
    page = (tmp_path / "fronts.md").read_text()
    assert all(f"| `{label}` |" in page for label in benchmark.SAMPLERS)
    capsys.readouterr()
    benchmark.main(command)
    assert "seed" not in capsys.readouterr().out.split("#")[0]  # nothing ran again
    assert (tmp_path / "fronts.md").read_text() == page


def test_hypervolumes_are_shares_of_the_ideal_one(studies: Any) -> None:
    problem = studies("fronts").zdt_problem(1, 3)
    assert problem.hypervolume(problem.front) == 1.0
    assert problem.ideal == pytest.approx(1.1**2 - 1 / 3, abs=1e-3)
    assert problem.hypervolume(np.empty((0, 2))) == 0.0
    assert problem.hypervolume(np.array([[0.0, 1.2]])) == 0.0
    best = problem.evaluate({"x0": 0.25, "x1": 0.0, "x2": 0.0}, np.random.default_rng(0))[1]
    assert best.tolist() == [0.25, 0.5]
    assert problem.hypervolume(best[None]) == pytest.approx(0.85 * 0.6 / problem.ideal)
    # In five pieces, whose best second value is below 0.
    assert studies("fronts").zdt_problem(3, 3).front.min() == pytest.approx(-0.7734, abs=1e-3)


def test_ratios_and_shares(studies: Any) -> None:
    def result(spent: float, *, reached: bool = True, best: float = 0.5) -> dict[str, Any]:
        ends = [
            {"trial": 0, "score": None, "tokens": spent / 4, "seconds": spent / 4},
            {"trial": 1, "score": best, "tokens": spent / 2, "seconds": spent / 2},
            {"trial": 2, "score": 0.1, "tokens": spent, "seconds": spent},
        ]
        own = {"tokens": spent, "seconds": spent, "trials": 3, "reached": reached, "best": best}
        return own | {"ended": ends, "sampler_seconds": 1.0, "pruner_seconds": 0.0}

    found = {
        (task, 0): {"naive": result(spent), "shared base": result(40), "sampler": result(10)}
        for task, spent in (("a", 80), ("b", 160))
    }
    benchmark = studies("compute_to_target_tables")
    names = ("naive", "shared base", "sampler")
    summary = benchmark.summarise(found, names)
    sampler = summary["arms"]["sampler"]
    # 8 and 16 times less than all that the naive arm spent, half as much to its first hit.
    assert sampler["tokens_to_50_trials"] == pytest.approx([128**0.5, 8, 16])
    assert sampler["tokens_to_first_hit"] == pytest.approx([32**0.5, 4, 8])
    parts = summary["parts"]
    assert parts["sampler"]["tokens"]["factor"] == pytest.approx([4, 4, 4])
    assert parts["sampler"]["tokens"]["verdict"] == "pays"
    assert parts["shared base"]["tokens"]["verdict"] == "not shown"
    assert sum(part["seconds"]["share"] for part in parts.values()) == pytest.approx(1)
    # Whoever does not get there counts with twice what was spent.
    found["a", 0]["sampler"] = result(10, reached=False)
    late = benchmark.summarise(found, names)["arms"]["sampler"]
    assert late["reached"] == 1
    assert late["tokens_to_50_trials"][0] == pytest.approx((4 * 16) ** 0.5)


def test_intervals_keep_pairs_together(studies: Any) -> None:
    measuring = studies("measuring")
    naive = np.array([1.0, 10.0, 100.0, 1000.0])
    found = measuring.interval(np.stack([naive, naive / 3], axis=1), measuring.ratio_of_medians)
    assert found == pytest.approx([3, 3, 3])


def test_records_outlive_a_kill(studies: Any, tmp_path: Path) -> None:
    measuring, path = studies("measuring"), tmp_path / "records.jsonl"
    measuring.Records(path).add({"arm": "a", "sizes": (1, 2)}, {"seconds": 1.0})
    with path.open("a") as file:
        file.write('{"key": {"arm": "b"}, "resu')
    records = measuring.Records(path)
    assert records.find({"arm": "a", "sizes": (1, 2)}) == {"seconds": 1.0}
    assert records.find({"arm": "b"}) is None
    records.add({"arm": "b"}, {"seconds": 2.0})
    assert measuring.Records(path).find({"arm": "b"}) == {"seconds": 2.0}


def test_workers_begin_together_and_failures_are_shown(studies: Any, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(STUDIES)!r})\n"
        "import measuring\n"
        "def prepare(job):\n"
        "    print('noise')\n"
        "    time.sleep(job['sleeps'])\n"
        "    ready = time.monotonic()\n"
        "    return lambda: {'ready': ready, 'began': time.monotonic(), 'half': 2 / job['of']}\n"
        "measuring.serve(prepare)\n"
    )
    launch = studies("measuring").launch
    first, second = launch(str(script), [{"sleeps": 0, "of": 4}, {"sleeps": 0.3, "of": 4}])
    assert first["half"] == 0.5
    assert min(first["began"], second["began"]) >= max(first["ready"], second["ready"])
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        launch(str(script), [{"sleeps": 0, "of": 0}])


def test_architectures_are_tried_once_and_refusals_come_with_their_sentence(
    studies: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--record", str(tmp_path / "record.jsonl"), "--page", str(tmp_path / "page.md")]
    study = studies("architectures")
    study.main([*files, "mamba", "cpmant"])
    assert capsys.readouterr().out.startswith("mamba: works")
    study.main([*files, "musicgen"])
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "Of the 3 architectures" in page
    assert "| mamba | 4 | 4 | 0 | 4 | fused | yes | `backbone.layers.*.mixer.dt_proj`" in page
    assert "| cpmant | model.name: this cpmant model sees the tokens that it should" in page
    assert "| musicgen | AttributeError" in page
