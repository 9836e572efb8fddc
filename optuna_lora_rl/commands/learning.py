"""Commands about samplers: compare them, train the learned one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Annotated

import typer

from optuna_lora_rl.commands.given import Overrides
from optuna_lora_rl.commands.given import StudyFile
from optuna_lora_rl.commands.given import console
from optuna_lora_rl.commands.given import load
from optuna_lora_rl.commands.given import split

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()


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

    load(file, overrides)
    comparison.compare(
        file,
        samplers=split(samplers) or [],
        seeds=seeds,
        workers=workers,
        output=output,
        overrides=overrides,
        console=console(),
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
    weights = training.train(output, chosen, minutes=minutes, report=_progress(console()))
    console().print(f"the weights are in {weights}", highlight=False)


def _progress(console: Console) -> Callable[[dict[str, float]], None]:
    def report(metrics: dict[str, float]) -> None:
        console.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), soft_wrap=True)

    return report
