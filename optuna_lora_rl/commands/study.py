"""Commands that run a study and show it."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.commands.given import AllLayers
from optuna_lora_rl.commands.given import AsJson
from optuna_lora_rl.commands.given import Overrides
from optuna_lora_rl.commands.given import Quiet
from optuna_lora_rl.commands.given import StudyFile
from optuna_lora_rl.commands.given import again
from optuna_lora_rl.commands.given import load
from optuna_lora_rl.commands.given import working
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.errors import masked
from optuna_lora_rl.terminal import console

app = typer.Typer()

TrialNumber = Annotated[
    int | None, typer.Option("--trial", help="Number of a trial; the best one by default.")
]


class ExportFormat(StrEnum):
    """What ``export`` can write."""

    peft = "peft"


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="STUDY.YAML", help="The file to write.")] = Path(
        "study.yaml"
    ),
    model: Annotated[str, typer.Option(help="tiny, a local folder or a hub name.")] = "tiny",
    train: Annotated[
        str, typer.Option(help="tiny:<task>, a .jsonl/.csv/.parquet file, or a hub name.")
    ] = "tiny:dates-small",
    trials: Annotated[int, typer.Option(min=1, help="Number of trials.")] = 20,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a study's file with a comment on every key.

    Example: [bold]optuna-lora-rl init my.yaml --model Qwen/Qwen2.5-0.5B --train data.jsonl[/]
    """
    from optuna_lora_rl.study import reference
    from optuna_lora_rl.study import wording

    for note in reference.write_commented(
        file, model=model, train=train, trials=trials, force=force
    ):
        console().print(masked(note), highlight=False, markup=False, soft_wrap=True)
    said = f"wrote {file}; next: {wording.program()} run {shlex.quote(str(file))}"
    console().print(masked(said), highlight=False, markup=False, soft_wrap=True)


@app.command()
def validate(
    file: StudyFile,
    overrides: Overrides = [],  # noqa: B006
    measure: Annotated[
        bool, typer.Option("--measure", help="Load model and data too, and time two steps.")
    ] = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check a study's file, and that its model, data, machine and storage can be used.

    Nothing is trained, fetched or created, and of the data only the first rows are read. What
    passes here, run begins with. With --measure the model and the data are loaded and two steps
    of a typical trial are timed, to say what a trial will take. Exit status: 0, or 2 with a
    sentence for each obstacle.

    Example: [bold]optuna-lora-rl validate studies/quickstart.yaml[/]
    """
    with working("checking", quiet=quiet) as on_activity:
        from optuna_lora_rl.study import checks
        from optuna_lora_rl.study import fine_tuner
        from optuna_lora_rl.study import summary

        spec = load(file, overrides)
        checks.require(spec)
        notes = list(checks.notes(spec))
        if measure:
            notes += fine_tuner.measured(spec, on_activity)
    summary.description(console(), spec, notes, as_json=json)


@app.command()
def run(
    file: StudyFile,
    overrides: Overrides = [],  # noqa: B006
    plain: Annotated[
        bool, typer.Option("--plain", help="One line a trial, also on a terminal.")
    ] = False,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="A line for each evaluation too; --plain.")
    ] = False,
) -> None:
    """Run a study to its budget, or go on with it.

    Ctrl-C ends it cleanly; the same command goes on. Several workers may run the same file at
    once. Exit status: 0 at the end of the budget; 1 when it has nothing to show, because no trial
    was completed or the best adapter is no better than the untuned model, and when the first
    trials all fail the same way; 2 for a mistake in the file, or where the machine cannot run it;
    130 after Ctrl-C.

    Example: [bold]optuna-lora-rl run quickstart --set budget.trials=30[/]
    """
    from optuna_lora_rl.study import panel
    from optuna_lora_rl.study import runner
    from optuna_lora_rl.study import summary

    if quiet and verbose:
        raise UserError("--quiet and --verbose do not go together; leave one out")
    spec, terminal = load(file, overrides), console(quiet=quiet)
    shown = panel.create(terminal, plain=plain or quiet, verbose=verbose)
    result = runner.run(spec, display=shown)
    summary.ending(terminal, result, spec, command=again(file, overrides))
    raise typer.Exit(result.exit_code)


@app.command()
def status(
    file: StudyFile,
    overrides: Overrides = [],  # noqa: B006
    json: AsJson = False,
) -> None:
    """Show how far a study is, and its best trials.

    Example: [bold]optuna-lora-rl status studies/quickstart.yaml[/]
    """
    with working("reading the study"):
        from optuna_lora_rl.study import opening
        from optuna_lora_rl.study import results
        from optuna_lora_rl.study import summary

        spec = load(file, overrides)
        study = opening.load_study(spec)
        results.restore(study, spec)
    if json:
        print(summary.standing_as_json(study, spec))
        return
    summary.standing(console(), study, spec)


@app.command()
def best(
    file: StudyFile,
    overrides: Overrides = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="Everything known of it, as JSON.")] = False,
) -> None:
    """Show the best configuration.

    Example: [bold]optuna-lora-rl best studies/quickstart.yaml --json[/]
    """
    with working("reading the study"):
        from optuna_lora_rl.study import opening
        from optuna_lora_rl.study import results
        from optuna_lora_rl.study import summary

        spec = load(file, overrides)
        study = opening.load_study(spec)
        results.restore(study, spec)
    summary.best(console(), study, spec, as_json=json)


@app.command()
def report(
    file: StudyFile,
    trial: TrialNumber = None,
    overrides: Overrides = [],  # noqa: B006
    whole: AllLayers = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write the trial's layers, a row a layer.")
    ] = None,
) -> None:
    """Show what became of a trial's layers, and write the study's report.

    Ranks and how they changed, trends, a table layer by layer, and what they suggest. More than
    64 layers are summed up by kind and range of blocks.

    Example: [bold]optuna-lora-rl report studies/quickstart.yaml --trial 3[/]
    """
    with working("reading the study") as on_activity:
        from optuna_lora_rl.study import adapters as exporting
        from optuna_lora_rl.study import opening
        from optuna_lora_rl.study import rank_report
        from optuna_lora_rl.study import report as reporting
        from optuna_lora_rl.study import results

        spec = load(file, overrides)
        study = opening.load_study(spec)
        chosen = exporting.chosen_trial(study, trial)
        opening.claim(spec)
        on_activity(Activity("writing the report"))
        results.write(study, spec)
    rank_report.show(console(), chosen, spec, whole=whole)
    if csv is not None:
        rank_report.write_csv(csv, chosen, spec)
        console().print(f"wrote {csv}", highlight=False, markup=False, soft_wrap=True)
    console().print(f"wrote {spec.folder / reporting.FILE}", highlight=False, soft_wrap=True)


@app.command()
def ask(
    file: StudyFile,
    overrides: Overrides = [],  # noqa: B006
    count: Annotated[int, typer.Option(min=1, help="How many configurations.")] = 1,
) -> None:
    """Ask the study's sampler for configurations, as JSON, to run them elsewhere.

    Example: [bold]optuna-lora-rl ask study.yaml[/] prints one JSON object a line:
    trial, params (what is tuned) and configuration (every parameter).
    """
    with working("proposing"):
        from optuna_lora_rl.study import asking

        asked = asking.ask(load(file, overrides), count)
        # Most of the time goes by before it.
        first = next(asked)
    with closing(asked):
        for line in chain([first], asked):
            print(line)


@app.command()
def tell(
    file: StudyFile,
    result: Annotated[
        str, typer.Argument(metavar="JSON", help="The result, or - to read it from stdin.")
    ],
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Tell the study the result of a configuration that was asked for.

    Example: [bold]optuna-lora-rl tell study.yaml '{"trial": 3, "value": 0.42}'[/].
    Several objectives: "values": [...]. No result: "state": "fail", with an optional "reason".
    """
    said = sys.stdin.read() if result == "-" else result
    with working("reading the study"):
        from optuna_lora_rl.study import asking

        told = asking.tell(load(file, overrides), said)
    print(told)


@app.command()
def export(
    file: StudyFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    to: Annotated[ExportFormat, typer.Option(help="The format.")] = ExportFormat.peft,
    trial: TrialNumber = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write a trial's adapter for other programs.

    Example: [bold]optuna-lora-rl export study.yaml --to peft --output my-adapter[/]
    """
    with working("writing the adapter"):
        from optuna_lora_rl.study import adapters as exporting
        from optuna_lora_rl.study import opening

        spec = load(file, overrides)
        fault = exporting.to_peft(opening.load_study(spec), spec, output, trial)
    what = f"adapter_config.json ({fault})" if fault else "adapter"
    console().print(f"wrote the {what} to {output}", highlight=False, markup=False)


@app.command()
def explain(
    file: StudyFile,
    trial: Annotated[
        int | None, typer.Option("--trial", help="Number of a trial; all by default.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    json: AsJson = False,
) -> None:
    """Say where each trial's configuration came from and why, and what the trials taught.

    Without --trial it also writes a figure: the predicted score along each parameter.

    Example: [bold]optuna-lora-rl explain studies/quickstart.yaml --trial 7[/]
    """
    with working("reading the study") as on_activity:
        from optuna_lora_rl.samplers.explanation import explain as explained
        from optuna_lora_rl.study import explaining
        from optuna_lora_rl.study import opening

        spec = load(file, overrides)
        study = opening.load_study(spec)
        on_activity(Activity("explaining its trials"))
        said = explaining.as_json(study, trial) if json else ""
        found = None if json or trial is not None else explained(study)
    if json:
        print(said)
        return
    figure = explaining.show(console(), study, spec, trial, found=found)
    if figure is not None:
        console().print(f"the figure is in {figure}", highlight=False)


@app.command()
def dashboard(
    file: StudyFile,
    overrides: Overrides = [],  # noqa: B006
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
) -> None:
    """Show the study in optuna-dashboard, with its notes, artifacts and figure.

    Example: [bold]optuna-lora-rl dashboard studies/quickstart.yaml --port 8081[/]
    """
    with working("reading the study"):
        from optuna_lora_rl.study import dashboard as showing

        server = showing.listening(load(file, overrides), host=host, port=port)
    showing.serve(server)
