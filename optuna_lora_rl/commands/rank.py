"""Commands that look at models and adapters, without a study."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from optuna_lora_rl.commands.given import AllLayers
from optuna_lora_rl.commands.given import AsJson
from optuna_lora_rl.commands.given import Quiet
from optuna_lora_rl.commands.given import load
from optuna_lora_rl.commands.given import split
from optuna_lora_rl.commands.given import working
from optuna_lora_rl.terminal import console

app = typer.Typer()

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
    whole: AllLayers = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show the singular values of a model's weights or an adapter's updates, layer by layer.

    An adapter's base is not loaded; given with --model, the updates are compared with it. More
    than 64 layers are summed up by kind and range of blocks.

    Example: [bold]optuna-lora-rl analyze --model tiny --csv spectra.csv --figure map.html[/]
    """
    with working(quiet=quiet):
        from optuna_lora_rl.commands import layers

    layers.analyze(
        console(),
        console(stderr=True, quiet=quiet),
        model,
        adapter,
        modules=split(modules),
        dtype=dtype.value,
        exact=exact,
        files=layers.Files(csv=csv, figure=figure, capacity=capacity),
        whole=whole,
        as_json=json,
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
    learnt: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the tokens that is learnt, the completions'."),
    ] = 1.0,
    examples: Annotated[
        int | None, typer.Option(min=1, help="How many training examples there are.")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Activations are recomputed.")
    ] = False,
    dtype: Annotated[WeightType, typer.Option(help="Type of the frozen weights.")] = (
        WeightType.auto
    ),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the decisions as JSON.")
    ] = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Advise ranks to begin with, with reasons, and the memory that training takes.

    Example: [bold]optuna-lora-rl advise --model tiny --task-complexity medium --memory-gb 8[/]
    """
    with working(quiet=quiet):
        from optuna_lora_rl.commands import layers
        from optuna_lora_rl.finetuning import advisor

    layers.advise(
        console(),
        console(stderr=True, quiet=quiet),
        model,
        complexity=task_complexity.value,
        memory_gb=memory_gb,
        workload=advisor.Workload(
            batch_size=batch_size,
            length=length,
            learnt=learnt,
            checkpointing=checkpointing,
            examples=examples,
        ),
        modules=split(modules),
        by_weight=by_weight,
        dtype=dtype.value,
        output=output,
        as_json=json,
    )


@app.command()
def truncate(
    adapter: AdapterFolder,
    energy: Annotated[
        float | None, typer.Option(help="Share of each update's energy to keep, such as 0.95.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank to keep.")] = None,
    study: Annotated[
        Path | None,
        typer.Option(help="A study's file: show on its validation set what each would leave."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    whole: AllLayers = False,
    quiet: Quiet = False,
) -> None:
    """Cut a trained adapter to the rank that its updates need, without loading its base.

    Without --energy and --rank, shows what each would leave; with --study of its quality too.

    Example: [bold]optuna-lora-rl truncate my-adapter --energy 0.95 --output smaller[/]
    """
    with working(quiet=quiet):
        from optuna_lora_rl.commands import layers

    qualities = None
    if study is not None:
        from optuna_lora_rl.finetuning import process
        from optuna_lora_rl.study import fine_tuner

        # Both refuse what cannot be used, before the adapter is decomposed.
        process.check()
        qualities = partial(fine_tuner.qualities, load(study, []), adapter)

    layers.truncate(
        console(),
        console(stderr=True, quiet=quiet),
        adapter,
        output,
        energy=energy,
        rank=rank,
        qualities=qualities,
        whole=whole,
    )


@app.command()
def merge(
    adapter: AdapterFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Its base; the one that it names by default.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Merge an adapter into its base model, and write that as an ordinary model folder.

    Example: [bold]optuna-lora-rl merge my-adapter --output merged[/]
    """
    with working(quiet=quiet):
        from optuna_lora_rl.commands import layers

    layers.merge(console(), console(stderr=True, quiet=quiet), adapter, model, output)
