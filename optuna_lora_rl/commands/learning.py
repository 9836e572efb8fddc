"""Commands about samplers: compare them, train the learned one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optuna_lora_rl.commands.given import Overrides
from optuna_lora_rl.commands.given import Quiet
from optuna_lora_rl.commands.given import StudyFile
from optuna_lora_rl.commands.given import split
from optuna_lora_rl.commands.given import working
from optuna_lora_rl.terminal import console

app = typer.Typer()

_Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that run studies; one a core by default."),
]


@app.command()
def compare(
    file: StudyFile,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results.")
    ] = None,
    samplers: Annotated[str, typer.Option(help="Names, separated by commas.")] = "rl,tpe,random",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds each, from 0 on.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Studies at the same time.")] = 1,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Compare samplers on one fine-tuning study.

    The study is run with several samplers and seeds, and the best scores are compared. Running it
    again goes on with what is missing.

    Example: [bold]optuna-lora-rl compare study.yaml --samplers rl,tpe --seeds 5 -o results[/]
    """
    with working():
        from optuna_lora_rl.study import comparison

    try:
        comparison.compare(
            file,
            samplers=split(samplers) or (),
            seeds=seeds,
            workers=workers,
            output=output,
            overrides=overrides,
            console=console(),
        )
    except KeyboardInterrupt:
        console().print("Interrupted; the same command goes on with what is missing.")
        raise typer.Exit(130) from None


@app.command("train-policy")
def train_policy(
    file: Annotated[
        Path, typer.Argument(metavar="POLICY.YAML", help="Settings of the training run.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; a run in it goes on.")
    ] = Path("policy"),
    overrides: Overrides = [],  # noqa: B006
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long; the run can go on later.")
    ] = None,
    quiet: Quiet = False,
    processes: _Processes = None,
) -> None:
    """Train a policy for RLSampler, to be used as its weights.

    Writes weights, metrics (also for TensorBoard), a figure and a report to the folder. The same
    command goes on with a run that was interrupted, with as many processes as it likes: they do
    not change the weights.

    Example: [bold]optuna-lora-rl train-policy studies/policy.yaml -o policy[/], then
    sampler: {name: rl, weights: policy/weights.safetensors} in a study's file.
    """
    with working(quiet=quiet) as on_activity:
        from optuna_lora_rl.learning import training
        from optuna_lora_rl.learning.settings import TrainingSettings
        from optuna_lora_rl.study import reading

        content = reading.read_yaml(file)
        reading.override(content, overrides, {})
        settings = reading.validate(TrainingSettings, content, str(file))
        try:
            weights = training.train(
                output,
                settings,
                minutes=minutes,
                report=_say,
                on_activity=on_activity,
                processes=processes or _cores(),
            )
        except KeyboardInterrupt:
            print("Interrupted; the same command goes on from the last checkpoint.")
            raise typer.Exit(130) from None
    # Paths are not broken into lines: they are there to be copied.
    console().print(f"the weights are in {weights}, the figure beside them", soft_wrap=True)


def _cores() -> int:
    """That this process may use, as torch counts them."""
    import torch

    return torch.get_num_threads()


def _say(metrics: dict[str, float]) -> None:
    """Prints what a validation found, on one line."""
    if "validation_gain" not in metrics:
        return
    phase = "imitation" if "imitation_loss" in metrics else "ppo"
    leads = [
        f"{name.removeprefix('lead_')} {value:+.3f}"
        for name, value in metrics.items()
        if name.startswith("lead_")
    ]
    # rich would write it into the bar.
    print(
        f"update {metrics['update']:.0f} ({phase}): log10 regret better than the start's by"
        f" {metrics['validation_gain']:+.3f}"
        f" ({metrics['gain_low']:+.3f} to {metrics['gain_high']:+.3f});"
        f" lead over the best opponent: {', '.join(leads)}",
        flush=True,
    )
