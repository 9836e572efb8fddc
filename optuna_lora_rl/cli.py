"""The command line: ``optuna-lora-rl``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Annotated

import typer

from optuna_lora_rl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from optuna_lora_rl.study.spec import StudySpec

app = typer.Typer(
    name="optuna-lora-rl",
    help="Finds good LoRA fine-tuning configurations with little compute.\n\n"
    "Begin with [bold]optuna-lora-rl init study.yaml[/], then "
    "[bold]optuna-lora-rl run study.yaml[/].",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Columns of output that goes to a file or a pipe.
_FILE_WIDTH = 140

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.YAML", help="The study's file.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the file, such as --set budget.trials=5; may be repeated.",
    ),
]
TrialNumber = Annotated[
    int | None, typer.Option("--trial", help="Number of a trial; the best one by default.")
]


ModelName = Annotated[str, typer.Option("--model", help="tiny, a local folder or a hub name.")]
Modules = Annotated[
    str | None,
    typer.Option(help="Ends of layers' names, separated by commas, such as q_proj,v_proj."),
]
AdapterFolder = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter, in PEFT's format.")
]


class WeightType(StrEnum):
    """The types in which weights can be loaded."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Complexity(StrEnum):
    """How hard a task is."""

    low = "low"
    medium = "medium"
    high = "high"


class ExportFormat(StrEnum):
    """What ``export`` can write."""

    peft = "peft"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 and one sentence on a user's mistake."""
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        sys.stderr.close()
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        from optuna_lora_rl import __version__

        print(f"optuna-lora-rl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


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
    from optuna_lora_rl.study import template

    template.write(file, model=model, train=train, trials=trials, force=force)
    _console().print(f"wrote {file}; next: optuna-lora-rl run {file}", highlight=False)


@app.command()
def validate(file: StudyFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Check a study's file, without loading the model or the data.

    Example: [bold]optuna-lora-rl validate studies/quickstart.yaml[/]
    """
    from optuna_lora_rl.study import summary

    summary.description(_console(), _load(file, overrides))


@app.command()
def run(
    file: StudyFile,
    overrides: Overrides = [],  # noqa: B006
    plain: Annotated[
        bool, typer.Option("--plain", help="One line a trial, also on a terminal.")
    ] = False,
) -> None:
    """Run a study to its budget, or go on with it.

    Ctrl-C ends it cleanly; the same command goes on. Several workers may run the same file at
    once. Exit status: 0 at the end of the budget, 1 when the first trials all failed the same
    way, 2 for a mistake in the file, 130 after Ctrl-C.

    Example: [bold]optuna-lora-rl run studies/quickstart.yaml --set budget.trials=30[/]
    """
    from optuna_lora_rl.study import display
    from optuna_lora_rl.study import runner
    from optuna_lora_rl.study import summary

    spec, console = _load(file, overrides), _console()
    result = runner.run(spec, display=display.create(console, plain=plain))
    summary.ending(console, result, spec, command=_again(file, overrides))
    raise typer.Exit(runner.EXIT_CODES[result.ended_by])


@app.command()
def status(file: StudyFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Show how far a study is, and its best trials.

    Example: [bold]optuna-lora-rl status studies/quickstart.yaml[/]
    """
    from optuna_lora_rl.study import opening
    from optuna_lora_rl.study import summary

    spec = _load(file, overrides)
    summary.standing(_console(), opening.load_study(spec), spec)


@app.command()
def best(
    file: StudyFile,
    overrides: Overrides = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="Everything known of it, as JSON.")] = False,
) -> None:
    """Show the best configuration.

    Example: [bold]optuna-lora-rl best studies/quickstart.yaml --json[/]
    """
    from optuna_lora_rl.study import opening
    from optuna_lora_rl.study import summary

    spec = _load(file, overrides)
    summary.best(_console(), opening.load_study(spec), spec, as_json=json)


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
    from optuna_lora_rl.study import asking

    for line in asking.ask(_load(file, overrides), count):
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
    from optuna_lora_rl.study import asking

    said = sys.stdin.read() if result == "-" else result
    print(asking.tell(_load(file, overrides), said))


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
    from optuna_lora_rl.study import export as exporting
    from optuna_lora_rl.study import opening

    spec = _load(file, overrides)
    complete = exporting.to_peft(opening.load_study(spec), spec, output, trial)
    what = "adapter" if complete else "adapter_config.json (the weights were not kept)"
    _console().print(f"wrote the {what} to {output}", highlight=False)


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
    from optuna_lora_rl.study import dashboard as showing

    raise typer.Exit(showing.serve(_load(file, overrides), host=host, port=port))


@app.command()
def compare(
    file: StudyFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    samplers: Annotated[str, typer.Option(help="Names, separated by commas.")] = "rl,tpe,random",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds each, from 0 on.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Studies at the same time.")] = 1,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run the same study with several samplers and seeds, and compare the best scores.

    Running it again goes on with what is missing.

    Example: [bold]optuna-lora-rl compare study.yaml --samplers rl,tpe --seeds 5 -o results[/]
    """
    from optuna_lora_rl.study import comparison

    _load(file, overrides)
    comparison.compare(
        file,
        samplers=samplers.split(","),
        seeds=seeds,
        workers=workers,
        output=output,
        overrides=overrides,
        console=_console(),
    )


@app.command("train-policy")
def train_policy(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; a run in it goes on.")
    ],
    settings: Annotated[
        Path | None,
        typer.Option("--settings", metavar="SETTINGS.YAML", help="Settings of the training run."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long; the run can go on later.")
    ] = None,
) -> None:
    """Train a policy for RLSampler, to be used as its weights.

    Example: [bold]optuna-lora-rl train-policy --output policy --minutes 60[/], then
    sampler: {name: rl, weights: policy/weights.safetensors} in a study's file.
    """
    from optuna_lora_rl.learning import training

    chosen = training.TrainingSettings() if settings is None else training.load_settings(settings)
    weights = training.train(output, chosen, minutes=minutes, report=_progress(_console()))
    _console().print(f"the weights are in {weights}", highlight=False)


@app.command()
def analyze(
    model: Annotated[
        str | None, typer.Option("--model", help="tiny, a local folder or a hub name.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Analyse a saved adapter's updates instead.")
    ] = None,
    modules: Modules = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the table as CSV.")] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Write a heat map, layers by modules, as HTML.")
    ] = None,
    capacity: Annotated[
        Path | None,
        typer.Option("--capacity", help="Show what each rank takes, and write it as HTML."),
    ] = None,
    dtype: Annotated[WeightType, typer.Option(help="Type to load the weights in.")] = (
        WeightType.auto
    ),
    exact: Annotated[
        bool, typer.Option("--exact", help="Decompose large weights whole; slow.")
    ] = False,
) -> None:
    """Show the singular values of a model's weights or an adapter's updates, layer by layer.

    An adapter's base is not loaded; given with --model, the updates are compared with it.

    Example: [bold]optuna-lora-rl analyze --model tiny --csv spectra.csv --figure map.html[/]
    """
    from optuna_lora_rl.rank import commands

    commands.analyze(
        _console(),
        model,
        adapter,
        modules=_split(modules),
        dtype=dtype.value,
        exact=exact,
        files=commands.Files(csv=csv, figure=figure, capacity=capacity),
    )


@app.command()
def advise(
    model: ModelName,
    task_complexity: Annotated[
        Complexity, typer.Option(help="How hard the task is.")
    ] = Complexity.medium,
    memory_gb: Annotated[
        float | None, typer.Option(min=0, help="Memory there is, in 10^9 bytes.")
    ] = None,
    modules: Modules = None,
    by_weight: Annotated[
        bool, typer.Option("--by-weight", help="Differ layer by layer, by the weights' spectra.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Their length in tokens.")] = 512,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Activations are recomputed.")
    ] = False,
    dtype: Annotated[WeightType, typer.Option(help="Type of the frozen weights.")] = (
        WeightType.auto
    ),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the decisions as JSON.")
    ] = None,
) -> None:
    """Advise ranks to begin with, with reasons, and the memory that training takes.

    Example: [bold]optuna-lora-rl advise --model tiny --task-complexity medium --memory-gb 8[/]
    """
    from optuna_lora_rl.rank import advisor
    from optuna_lora_rl.rank import commands

    commands.advise(
        _console(),
        model,
        complexity=task_complexity.value,
        memory_gb=memory_gb,
        workload=advisor.Workload(
            batch_size=batch_size, length=length, checkpointing=checkpointing, examples=examples
        ),
        modules=_split(modules),
        by_weight=by_weight,
        dtype=dtype.value,
        output=output,
    )


@app.command()
def truncate(
    adapter: AdapterFolder,
    energy: Annotated[
        float | None, typer.Option(help="Share of each update's energy to keep, such as 0.95.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank to keep.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
) -> None:
    """Cut a trained adapter to the rank that its updates need, without loading its base.

    Without --energy and --rank, shows what each would leave.

    Example: [bold]optuna-lora-rl truncate my-adapter --energy 0.95 --output smaller[/]
    """
    from optuna_lora_rl.rank import commands

    commands.truncate(_console(), adapter, output, energy=energy, rank=rank)


@app.command()
def merge(
    adapter: AdapterFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Its base; the one that it names by default.")
    ] = None,
) -> None:
    """Merge an adapter into its base model, and write that as an ordinary model folder.

    Example: [bold]optuna-lora-rl merge my-adapter --output merged[/]
    """
    from optuna_lora_rl.rank import commands

    commands.merge(_console(), adapter, model, output)


def _split(words: str | None) -> list[str] | None:
    return None if words is None else [word.strip() for word in words.split(",")]


def _progress(console: Console) -> Callable[[dict[str, float]], None]:
    def report(metrics: dict[str, float]) -> None:
        console.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), soft_wrap=True)

    return report


def _load(file: Path, overrides: Sequence[str]) -> StudySpec:
    from optuna_lora_rl.study import spec

    return spec.load(file, overrides)


def _console() -> Console:
    """The terminal, or a file that is wide enough for a table."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def _again(file: Path, overrides: Sequence[str]) -> str:
    """The file and overrides as they have to be typed again."""
    import shlex

    return shlex.join([str(file), *(part for o in overrides for part in ("--set", o))])
