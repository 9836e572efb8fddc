"""Names, values and errors are shown as text in pages, notes and figures."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest

from optuna_lora_rl.rank import capacity
from optuna_lora_rl.rank import tables
from optuna_lora_rl.rank.spectrum import Spectrum
from optuna_lora_rl.samplers.explanation import explain
from optuna_lora_rl.study import dashboard
from optuna_lora_rl.study import explaining
from optuna_lora_rl.study import report
from optuna_lora_rl.study import runner
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.spec import StudySpec
from tests.study.conftest import MakeSpec
from tests.study.conftest import PaperTuner

SCRIPT = "<script>document.title='run'</script>"
EVENT = "<img src=x onerror=document.title='run'>"
LINK = "[here](javascript:document.title=1)"
NAME = f"{SCRIPT} **b** {LINK} `c` {EVENT}".replace("/", "")
SET = f"a|b `` <b>{LINK}</b> ![x](http:)"


class Elements(HTMLParser):
    """The names of a page's elements, and what is written between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.names.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def hostile(
    paper: type[PaperTuner], make_spec: MakeSpec, tmp_path: Path
) -> tuple[optuna.Study, StudySpec]:
    """A study with markup in its name, its data's path, its choices and its errors."""
    folder = tmp_path / "<b>data<"
    folder.mkdir()
    data = folder / "script>.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 20, encoding="utf-8")
    spec = make_spec(
        {
            "name": NAME,
            "data": {"train": str(data)},
            "target_sets": {SET: ["q_proj"], "<i>i</i>": ["v_proj"]},
            "space.target_modules": [SET, "<i>i</i>"],
            "budget": 7,
            "sampler": "rl",
        }
    )
    paper.failures = [None, RuntimeError(f"{SCRIPT} {EVENT}")]
    return runner.run(spec).study, spec


def test_the_report_shows_them_as_text(hostile: tuple[optuna.Study, StudySpec]) -> None:
    study, spec = hostile
    page = Elements(report.write(study, spec).read_text(encoding="utf-8"))
    assert not {"script", "img", "i", "a"} & set(page.names)
    assert all(words in page.text for words in (NAME, SET, f"{SCRIPT} {EVENT}", spec.data.train))


def test_notes_show_them_letter_by_letter(hostile: tuple[optuna.Study, StudySpec]) -> None:
    markdown = pytest.importorskip("markdown_it")
    pytest.importorskip("optuna_dashboard")
    study, spec = hostile
    dashboard.annotate(study, spec)
    stored = study._storage.get_study_system_attrs(study._study_id)
    notes = [note for key, note in stored.items() if "note_str" in key]
    assert len(notes) >= 2, "of the study and of a trial that was the best"
    reader = markdown.MarkdownIt("commonmark", {"html": True}).enable("table")
    pages = [Elements(reader.render(note)) for note in notes]
    assert not any({"script", "img", "b", "i", "a"} & set(page.names) for page in pages)
    shown = " ".join(page.text for page in pages)
    assert NAME in shown and ("<i>i</i>" in shown or SET in shown)


@pytest.mark.parametrize("text", [NAME, SET, "", "`", "``` a", "a\n# b", "|", "$x$", "x" * 5000])
def test_any_text_can_be_code(text: str) -> None:
    markdown = pytest.importorskip("markdown_it")
    rendered = markdown.MarkdownIt("commonmark").render(f"before {wording.code(text)} after")
    found = re.fullmatch(r"<p>before <code>(.*)</code> after</p>\n", rendered)
    assert found and html.unescape(found[1]).strip() == " ".join(text.split())


def texts(figure: Any) -> list[str]:
    """All that plotly reads tags in."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)
        elif isinstance(value, str):
            found.append(value)

    walk(figure.to_plotly_json())
    return found


def test_figures_show_them_as_text(hostile: tuple[optuna.Study, StudySpec]) -> None:
    study, _ = hostile
    found = texts(explain(study).figure())
    assert not any("<b>" in text or "<i>" in text for text in found)
    assert any("&lt;i&gt;i&lt;/i&gt;" in text for text in found)


def test_figures_of_weights_show_names_as_text() -> None:
    spectra = _spectra("model.layers.0.<b>q_proj</b>")
    found = texts(tables.heat_map(spectra, "Weights of <b>x</b>"))
    assert not any("<b>" in text for text in found)
    assert any("&lt;b&gt;x&lt;/b&gt;" in text for text in found)
    counted = capacity.over_ranks({"a": (8, 8)}, [1, 2])
    assert "Adapters: &lt;b&gt;x&lt;/b&gt;" in texts(
        capacity.figure(counted, "Adapters: <b>x</b>")
    )


def _spectra(name: str) -> dict[str, Spectrum]:
    import torch

    from optuna_lora_rl.rank import spectrum
    from optuna_lora_rl.rank.layers import Factors

    factors = Factors(a=torch.randn(2, 8), b=torch.randn(8, 2), scaling=1.0)
    return spectrum.of_all({name: factors})


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_nothing_of_it_runs_in_a_browser(hostile: tuple[optuna.Study, StudySpec]) -> None:
    from rich.console import Console

    study, spec = hostile
    pages = [report.write(study, spec)]
    pages += filter(None, [explaining.show(Console(quiet=True), study, spec)])
    for page in pages:
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(page)],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert "<title>run</title>" not in done.stdout
        assert "<html" in done.stdout and "javascript:" not in re.sub(r"\s", "", _links(done))


def _links(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(re.findall(r"""(?:href|src)=["'][^"']*""", done.stdout))
