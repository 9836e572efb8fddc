"""What optuna-dashboard shows beside the numbers: notes, artifacts, a figure.

optuna-dashboard is an optional package: without it the study goes on, and artifacts are kept.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.simple_server import WSGIServer
from wsgiref.simple_server import make_server

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts import upload_artifact
from optuna.trial import TrialState

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import first_line
from optuna_lora_rl.study import adapters
from optuna_lora_rl.study import charts
from optuna_lora_rl.study import layers
from optuna_lora_rl.study import outcome
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.opening import claim
from optuna_lora_rl.study.opening import load_study

if TYPE_CHECKING:
    from optuna_lora_rl.finetuning.trial import TrialResult
    from optuna_lora_rl.study.spec import StudySpec

FIGURE_ID = "quality-against-cost"


def artifact_folder(output: Path) -> Path:
    """Where the artifacts are kept; ``optuna-dashboard --artifact-dir`` reads it."""
    return output / "artifacts"


def attach(trial: optuna.Trial, result: TrialResult, spec: StudySpec) -> None:
    """Keeps a running trial's adapter configuration and loss curve, and a note if it is best."""
    folder = artifact_folder(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(str(folder))
    configuration = adapters.folder_of(spec.folder, trial.number) / adapters.CONFIG_FILE
    if configuration.exists():
        upload_artifact(artifact_store=store, file_path=str(configuration), study_or_trial=trial)
    points = [(row["step"], row["loss"]) for row in result.curve if "loss" in row]
    if points:
        with tempfile.TemporaryDirectory() as scratch:
            curve = Path(scratch) / "loss.svg"
            picture = charts.chart(
                [charts.Series(points, dots=True)], x="optimizer step", y="validation loss"
            )
            curve.write_text(picture, encoding="utf-8")
            upload_artifact(
                artifact_store=store,
                file_path=str(curve),
                study_or_trial=trial,
                mimetype="image/svg+xml",
            )
    best = outcome.best_of(trial.study.get_trials(deepcopy=False))
    before = outcome.final_score(best) if best else None
    if find_spec("optuna_dashboard") and (before is None or result.score > before):
        from optuna_dashboard import save_note

        save_note(trial, _trial_note(trial, before, spec))


def annotate(study: optuna.Study, spec: StudySpec) -> None:
    """Puts a note and a figure on the study, where optuna-dashboard is installed."""
    if not find_spec("optuna_dashboard"):
        return
    from optuna_dashboard import save_note

    save_note(study, _study_note(study, spec))
    _save_figure(study)


def listening(spec: StudySpec, *, host: str, port: int) -> WSGIServer:
    """Returns optuna-dashboard on the study's storage, listening and not yet answering.

    It runs in this process, so that no argument shows the storage's URL and its password to who
    lists processes.

    Raises:
        UserError: If optuna-dashboard is not installed, the study has not begun, or nothing can
            listen there.
    """
    if not find_spec("optuna_dashboard"):
        raise UserError(
            "optuna-dashboard is not installed: pip install 'optuna_lora_rl[dashboard]'"
        )
    from optuna_dashboard import wsgi

    study = load_study(spec)
    claim(spec)
    folder = artifact_folder(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    app = wsgi(study._storage, artifact_store=FileSystemArtifactStore(str(folder)))
    try:
        server = make_server(host, port, app, server_class=_Server, handler_class=_Handler)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(
            f"the dashboard cannot listen on {host}, port {port} ({reason}); give another with "
            "--host and --port"
        ) from None
    return server


def serve(server: WSGIServer) -> None:
    """Answers until Ctrl-C."""
    host, port, *_ = server.server_address
    print(f"listening on http://{host!s}:{port}/ until Ctrl-C", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


class _Server(ThreadingMixIn, WSGIServer):
    """Answers every request in a thread of its own: a page makes many at once."""

    daemon_threads = True


class _Handler(WSGIRequestHandler):
    """Says nothing of each request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def _trial_note(trial: optuna.Trial, before: float | None, spec: StudySpec) -> str:
    attrs = trial.user_attrs
    gain = "" if before is None else f" (before: {before:.4f})"
    configuration = attrs["configuration"].items()
    cells = ((name, wording.code(wording.number(value))) for name, value in configuration)
    rows = "\n".join("| {} | {} |".format(name, cell.replace("|", "\\|")) for name, cell in cells)
    of_layers = wording.code(layers.file_of(spec.folder, trial.number))
    kept = f"Its layers: {of_layers}.\n\n" if layers.ATTRIBUTE in attrs else ""
    return (
        f"**The best when it ended: score {attrs['score']:.4f}**{gain}, "
        f"quality {attrs['quality']:.4f} at cost {attrs['cost']:.3f}.\n\n"
        f"Why it was proposed: {wording.code(attrs.get('source', '?'))}.\n\n{kept}"
        f"| parameter | value |\n|---|---|\n{rows}\n"
    )


def _study_note(study: optuna.Study, spec: StudySpec) -> str:
    trials = study.get_trials(deepcopy=False)
    best = outcome.best_of(trials)
    lines = [
        f"## {wording.code(spec.name)}",
        f"{wording.code(spec.model.name)} on {wording.code(spec.data.train)}, sampler "
        f"`{spec.sampler.name}`, "
        f"{sum(outcome.counts(trial) for trial in trials)} trials.",
        "",
        "Score = quality − " + f"{spec.objective.cost_weight:g} × cost. Quality is what "
        f"`{spec.objective.metric}` gained over the untuned model; a cost of 1 is one run of the "
        "reference configuration.",
    ]
    if best is not None:
        configuration = outcome.configuration(best)
        lines += [
            "",
            f"**Best: trial {best.number}**, score {wording.score(outcome.final_score(best))}: "
            f"{wording.code(configuration)}.",
            "",
            f"Adapter: {wording.code(spec.folder / 'best')}; report: "
            f"{wording.code(spec.folder / 'report.html')}.",
        ]
    return "\n".join(lines)


def _save_figure(study: optuna.Study) -> None:
    """Quality against cost, a point a trial; small, since it lives in the database."""
    trials = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if {"quality", "cost"} <= trial.user_attrs.keys()
    ]
    if not trials:
        return
    import plotly.graph_objects as go
    from optuna_dashboard import save_plotly_graph_object

    figure = go.Figure(
        go.Scatter(
            x=[trial.user_attrs["cost"] for trial in trials],
            y=[trial.user_attrs["quality"] for trial in trials],
            mode="markers",
            text=[f"trial {trial.number}" for trial in trials],
            marker={"color": [outcome.final_score(t) for t in trials], "showscale": True},
        )
    )
    # The default template is 7 kB of styles that the dashboard brings itself.
    figure.update_layout(
        template="none",
        title="Quality against cost, coloured by score",
        xaxis_title="cost (1 = reference run)",
        yaxis_title="quality",
    )
    save_plotly_graph_object(study, figure, graph_object_id=FIGURE_ID)
