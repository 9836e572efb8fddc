"""What the commands ``analyze``, ``advise``, ``truncate`` and ``merge`` do and say."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from rich.text import Text

from optuna_lora_rl.activity import Activity
from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.finetuning import advisor
from optuna_lora_rl.rank import allocation
from optuna_lora_rl.rank import capacity
from optuna_lora_rl.rank import layer_names
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import merging
from optuna_lora_rl.rank import saved
from optuna_lora_rl.rank import spectrum
from optuna_lora_rl.rank import tables
from optuna_lora_rl.rank import truncation
from optuna_lora_rl.study import wording
from optuna_lora_rl.study.waiting import waiting

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from optuna_lora_rl.finetuning.advisor import Advice
    from optuna_lora_rl.finetuning.advisor import Complexity
    from optuna_lora_rl.finetuning.advisor import Workload
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.rank.spectrum import Spectrum

_LEGEND = (
    "Over 1%: the effective rank, values over 1% of the largest. Entropy, stable: smooth measures "
    "of rank. 90%, 95%: the rank that holds so much of the energy. 2-norm, F-norm: spectral and "
    "Frobenius norm."
)


_IN_GROUPS = (
    " Each is the median over the layers of a row, with the lowest and the highest; --all shows "
    "every layer, --csv FILE writes them."
)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files that an analysis writes besides what it prints."""

    csv: Path | None = None
    figure: Path | None = None
    capacity: Path | None = None


def analyze(
    console: Console,
    progress: Console,
    model: str | None,
    adapter: Path | None = None,
    *,
    modules: Sequence[str] | None = None,
    dtype: str = "auto",
    exact: bool = False,
    files: Files | None = None,
    whole: bool = False,
    as_json: bool = False,
) -> None:
    """Shows the spectra of a model's weights, or of an adapter's updates.

    Args:
        console: Where to.
        progress: Where to show how far it is.
        model: As for :func:`load`. Beside an adapter it is only loaded to compare norms.
        adapter: Folder of a saved adapter; its base is not needed.
        modules: Ends of the paths of the layers; None for all linear ones.
        dtype: As for :func:`load`.
        exact: Whether large matrices too are decomposed whole.
        files: What to write.
        whole: Whether every layer has its row, however many there are.
        as_json: Whether it is for programs.

    Raises:
        UserError: When neither is given, one cannot be read, or a file cannot be written.
    """
    files, left_out = files or Files(), {}
    for page in (files.figure, files.capacity):
        tables.check_page(page)
    with waiting(progress) as on_activity:
        if adapter is not None:
            title = f"Updates of the adapter {adapter}"
            found, more = _updates(adapter, model, modules, dtype, on_activity)
        elif model is not None:
            title, more = f"Weights of {model}", {}
            base = _load(model, dtype, on_activity)
            names = layer_names.chosen(layers.shapes_of(base), modules)
            up_to = 1 << 40 if exact else spectrum.EXACT_UP_TO
            found = spectrum.of_weights(base, names, exact_up_to=up_to, on_activity=on_activity)
            left_out = layers.others_of(base) if modules is None else {}
        else:
            raise UserError("analyze needs a --model, an --adapter or both")
    if as_json:
        print(wording.json_text({"title": title, "layers": _facts(found, more)}))
    else:
        console.print(Text(title, style="bold"))
        many = not whole and len(found) > layer_names.FEW
        table = tables.spectra_in_groups if many else tables.spectra
        console.print(table(found, more, console.width))
        legend = _LEGEND + (_IN_GROUPS if many else "")
        _say(console, legend + _estimated(found) + _left_out(left_out))
    _write(progress if as_json else console, title, found, more, files)


def _facts(
    found: Mapping[str, Spectrum], more: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    return {
        name: {**one.row(), **{heading: column[name] for heading, column in more.items()}}
        for name, one in found.items()
    }


def advise(
    console: Console,
    progress: Console,
    model: str,
    *,
    complexity: Complexity,
    memory_gb: float | None,
    workload: Workload,
    modules: Sequence[str] | None = None,
    by_weight: bool = False,
    dtype: str = "auto",
    output: Path | None = None,
    as_json: bool = False,
) -> None:
    """Shows ranks to begin with, why, what training takes, and the words for ``LoraConfig``.

    Args:
        console: Where to.
        progress: Where to show how far it is.
        model: As for :func:`load`.
        complexity: As for :func:`advisor.advise`.
        memory_gb: The same.
        workload: The same.
        modules: Ends of the paths of the layers; None for all linear ones.
        by_weight: Whether layers get rank by their weights' spectra, or all alike.
        dtype: As for :func:`load`.
        output: JSON file of the decisions; None for none.
        as_json: Whether they are shown for programs too.

    Raises:
        UserError: When the model cannot be loaded, a module is unknown, even rank 1 does not
            fit, or the file cannot be written.
    """
    with waiting(progress) as on_activity:
        base = _load(model, dtype, on_activity)
        every = layers.shapes_of(base)
        names = layer_names.chosen(every, modules)
        found = None
        if by_weight:
            spectra = spectrum.of_weights(base, names, on_activity=on_activity)
            found = allocation.importance_of_spectra(spectra)
    advice = advisor.advise(
        base,
        complexity=complexity,
        memory_gb=memory_gb,
        workload=workload,
        names=names,
        importance=found,
    )
    words = config_of(advice, every)
    asked: dict[str, Any] = {"model": model, "complexity": complexity, "memory_gb": memory_gb}
    asked |= {"workload": asdict(workload), "modules": modules, "by_weight": by_weight}
    decisions = wording.json_text(_decisions(asked | {"dtype": dtype}, advice, words))
    if as_json:
        print(decisions)
    else:
        console.print(Text(f"Ranks to begin with, for {model}", style="bold"))
        console.print(tables.ranks(advice.ranks))
        for reason in advice.reasons:
            console.print(Text(f"- {reason}"))
        console.print(tables.memory(advice.memory))
        console.print(Text(_python(words)), soft_wrap=True)
    if output is not None:
        _write_text(output, decisions)
        _say(progress if as_json else console, f"wrote {output}")


def config_of(advice: Advice, every: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a ``LoraConfig`` that follows an advice.

    Args:
        advice: The advice.
        every: All linear layers of the model, by name.
    """
    alphas = {name: advice.patterns.alpha_pattern[layers.exactly(name)] for name in advice.ranks}
    return {
        "r": advice.rank,
        "lora_alpha": advice.alpha,
        "target_modules": layer_names.targets(advice.ranks, every),
        "rank_pattern": layer_names.collapsed(advice.ranks, advice.rank),
        "alpha_pattern": layer_names.collapsed(alphas, advice.alpha),
    }


def truncate(
    console: Console,
    progress: Console,
    adapter: Path,
    output: Path | None,
    *,
    energy: float | None = None,
    rank: int | None = None,
    qualities: Callable[[OnActivity], Sequence[float]] | None = None,
    whole: bool = False,
) -> None:
    """Cuts a saved adapter down, or shows what that would give where neither bound is given.

    Args:
        console: Where to say so.
        progress: Where to show how far it is.
        adapter: Folder of the adapter.
        output: Folder that is written.
        energy: As for :func:`truncation.truncate`.
        rank: The same.
        qualities: Evaluates what each of :func:`truncation.sizes` would leave.
        whole: Whether every layer has its row, however many there are.

    Raises:
        UserError: As :func:`truncation.truncate`, or when there is no output for what is cut.
    """
    if energy is None and rank is None:
        if output is not None:
            raise UserError("truncate takes either --energy or --rank to write an adapter")
        with waiting(progress) as on_activity:
            on_activity(Activity(f"decomposing the updates of {adapter}"))
            sizes = truncation.sizes(truncation.cuttable(adapter).factors)
            left = None if qualities is None else qualities(on_activity)
        console.print(tables.sizes(sizes, left))
        from optuna_lora_rl.study import wording

        again = f"{wording.program()} {shlex.join(['truncate', str(adapter)])}"
        _say(console, f"Choose one: {again} --energy 0.95 --output FOLDER")
        return
    if qualities is not None:
        raise UserError("--study shows what each size leaves; it goes with no --energy or --rank")
    if output is None:
        raise UserError("truncate needs a folder to write, --output")
    with waiting(progress) as on_activity:
        found = truncation.truncate(
            adapter, output, energy=energy, rank=rank, on_activity=on_activity
        )
    many = not whole and len(found.before) > layer_names.FEW
    console.print((tables.truncation_in_groups if many else tables.truncation)(found))
    words = (
        f"{found.parameters_after:,} of {found.parameters_before:,} parameters are kept "
        f"({found.kept:.1%}); {tables.size(truncation.bytes_of(adapter))} before, "
        f"{tables.size(truncation.bytes_of(output))} now."
    )
    console.print(Text(words))
    _say(console, f"wrote {output}")


def merge(
    console: Console, progress: Console, adapter: Path, model: str | None, output: Path
) -> None:
    """Merges a saved adapter into its base.

    Args:
        console: Where to say so.
        progress: Where to show how far it is.
        adapter: Folder of the adapter.
        model: Its base; None for the one that the adapter names.
        output: Folder that is written.

    Raises:
        UserError: When one of them cannot be read or written.
    """
    from optuna_lora_rl.finetuning.isolation import quiet
    from optuna_lora_rl.finetuning.model import path_of

    config = saved.check(adapter)
    base = model or config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"the adapter in {str(adapter)!r} names no base model; give --model")
    options = _options(base, "--model" if model else str(adapter))
    revision = None if model else config.get("revision")
    with waiting(progress) as on_activity, quiet(on_activity):
        on_activity(Activity(f"merging into {base}"))
        path = path_of(options)
        count = merging.merge(path, adapter, output, revision=revision)
    _say(console, f"wrote the merged model to {output} ({tables.size(count)})")


def load(name: str, dtype: str = "auto") -> PreTrainedModel:
    """Loads a model, as a study does.

    Args:
        name: ``tiny``, a folder or a hub name.
        dtype: Type of its weights; ``auto`` for that of a study.

    Raises:
        UserError: When there is no such model, or it cannot be loaded.
    """
    from optuna_lora_rl.finetuning import model
    from optuna_lora_rl.finetuning.device import device_of

    if not name:
        raise UserError("--model: a model has a name")
    options = _options(name, "--model", dtype)
    try:
        return model.load(options, device_of(None)).model
    except UserError as error:
        # The same words, less the key of a study's file.
        raise UserError(f"--model: {str(error).removeprefix('model.name: ')}") from None


def _options(name: object, source: str, dtype: str = "auto") -> ModelOptions:
    from optuna_lora_rl.finetuning.options import ModelOptions
    from optuna_lora_rl.study import reading

    return reading.validate(ModelOptions, {"name": name, "dtype": dtype}, source)


def _load(name: str, dtype: str, on_activity: OnActivity) -> PreTrainedModel:
    from optuna_lora_rl.finetuning.isolation import quiet

    on_activity(Activity(f"loading {name}"))
    with quiet(on_activity):
        return load(name, dtype)


def _updates(
    adapter: Path,
    model: str | None,
    modules: Sequence[str] | None,
    dtype: str,
    on_activity: OnActivity,
) -> tuple[dict[str, Spectrum], dict[str, dict[str, float]]]:
    own = saved.read(adapter)
    own.check_plain()
    factors = {name: own.factors[name] for name in layer_names.chosen(own.factors, modules)}
    found = spectrum.of_all(factors, on_activity=on_activity)
    more: dict[str, dict[str, float]] = {"r": {name: one.rank for name, one in factors.items()}}
    if model is not None:
        loaded = _load(model, dtype, on_activity)
        own.check_fits(layers.shapes_of(loaded, with_head=True), model)
        base = layers.linear_modules(loaded, with_head=True)
        for name in factors:
            norm = float(layers.weight_of(base[name], name).float().norm()) or 1.0
            more.setdefault("dW/W", {})[name] = found[name].frobenius_norm / norm
    return found, more


def _write(
    console: Console,
    title: str,
    found: Mapping[str, Spectrum],
    more: Mapping[str, Mapping[str, float]],
    files: Files,
) -> None:
    if files.csv is not None:
        tables.write_csv(files.csv, found, more)
        _say(console, f"wrote {files.csv}")
    if files.figure is not None:
        tables.write_figure(files.figure, tables.heat_map(found, title))
        _say(console, f"wrote {files.figure}")
    if files.capacity is not None:
        shapes = {name: one.shape for name, one in found.items()}
        most = max(min(shape) for shape in shapes.values())
        counted = capacity.over_ranks(shapes, [2**i for i in range(most.bit_length())])
        console.print()
        console.print(tables.capacities(counted))
        tables.write_figure(files.capacity, capacity.figure(counted, f"Adapters: {title}"))
        _say(console, f"wrote {files.capacity}")


def _estimated(found: Mapping[str, Spectrum]) -> str:
    rough = [one for one in found.values() if not one.exact]
    if not rough:
        return ""
    return (
        f" Of {len(rough)} large weights the first {rough[0].computed} values are computed, to "
        f"{max(one.error for one in rough):.1%} of the largest, and the rest estimated; --exact "
        "computes all."
    )


def _left_out(others: Mapping[str, int]) -> str:
    if not others:
        return ""
    first = next(iter(others))
    parameters = wording.count(sum(others.values()))
    return (
        f" Left out are {len(others)} weights, of {parameters} parameters, that lie in no "
        f"linear layer, such as {first}."
    )


def _python(words: Mapping[str, Any]) -> str:
    lines = (f"    {name}={_literal(value)},\n" for name, value in words.items() if value)
    return "LoraConfig(\n" + "".join(lines) + ")"


def _literal(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    # Keys are regular expressions.
    entries = [f"""{f"r'{k}'" if chr(92) in k else repr(k)}: {v!r}""" for k, v in value.items()]
    if len(entries) < 4:
        return "{" + ", ".join(entries) + "}"
    return "{\n" + "".join(f"        {entry},\n" for entry in entries) + "    }"


def _decisions(
    asked: Mapping[str, Any], advice: Advice, words: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "asked": asked,
        "reasons": advice.reasons,
        "memory_bytes": {**asdict(advice.memory), "total": advice.memory.total},
        "ranks": advice.ranks,
        "lora_config": words,
    }


def _write_text(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"the advice cannot be written to {str(file)!r}: {error}") from None


def _say(console: Console, words: str) -> None:
    console.print(Text(words, style="dim"), soft_wrap=True)
