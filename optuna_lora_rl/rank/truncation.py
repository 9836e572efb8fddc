"""Trained adapters cut to what their updates need.

The best approximation of each layer's BA is taken from its factors (:mod:`.resizing`), by rank or
by share of energy. PEFT's ``save_as_lora`` comes to the same updates, but forms every product
d x k, sets alpha to the rank, and refuses adapters with trained biases; here scalings, biases,
DoRA's magnitudes and whatever else the adapter holds stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from optuna_lora_rl.activity import OnActivity
from optuna_lora_rl.activity import unseen
from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank import layers
from optuna_lora_rl.rank import resizing
from optuna_lora_rl.rank import saved
from optuna_lora_rl.rank import spectrum
from optuna_lora_rl.rank.layers import Factors
from optuna_lora_rl.rank.saved import SavedAdapter
from optuna_lora_rl.rank.spectrum import Spectrum


@dataclass(frozen=True)
class Truncation:
    """What truncating an adapter did.

    Attributes:
        before: Ranks before.
        after: Ranks now.
        errors: What of each update was lost, in Frobenius norm relative to the update.
        parameters_before: Parameters of the factors before.
        parameters_after: The same now.
    """

    before: dict[str, int]
    after: dict[str, int]
    errors: dict[str, float]
    parameters_before: int
    parameters_after: int

    @property
    def kept(self) -> float:
        """Parameters now as a share of those before."""
        return self.parameters_after / self.parameters_before


@dataclass(frozen=True)
class Size:
    """An adapter truncated by energy, before it is done.

    Attributes:
        energy: Share of each update's energy that is kept.
        ranks: The rank of each layer.
        parameters: Parameters of the factors.
        error: The largest relative error of a layer.
    """

    energy: float
    ranks: dict[str, int]
    parameters: int
    error: float

    @property
    def largest_rank(self) -> int:
        return max(self.ranks.values())


def truncate(
    source: str | Path,
    target: str | Path,
    *,
    energy: float | None = None,
    rank: int | None = None,
    on_activity: OnActivity = unseen,
) -> Truncation:
    """Truncates a saved adapter into another folder, without loading a model.

    Args:
        source: Folder of the adapter.
        target: Folder that is written; it may be the same.
        energy: Share of each layer's energy to keep, over 0 to 1; or
        rank: the largest rank of a layer.
        on_activity: Told how many updates are decomposed.

    Raises:
        UserError: When not exactly one of ``energy`` and ``rank`` is given or it is out of range,
            or a folder cannot be read or written.
    """
    _check(energy, rank)
    adapter = cuttable(source)
    spectra = spectrum.of_all(adapter.factors, on_activity)
    ranks = _ranks(adapter.factors, spectra, energy, rank)
    cut = {
        name: resizing.best_approximation(one, ranks[name]) if ranks[name] < one.rank else one
        for name, one in adapter.factors.items()
    }
    saved.write(target, adapter.config, adapter.tensors, cut)
    return _report(adapter.factors, spectra, ranks)


def cuttable(folder: str | Path) -> SavedAdapter:
    """Reads a saved adapter whose layers can each be cut to a rank of their own.

    Raises:
        UserError: When it cannot be read, or its layers cannot be cut.
    """
    adapter = saved.read(folder)
    adapter.check_plain()
    embeds = any(".lora_embedding_" in name for name in adapter.tensors)
    if embeds and adapter.config.get("ensure_weight_tying"):
        raise UserError(
            f"the adapter in {str(folder)!r} has ensure_weight_tying, so that embedding and "
            "output head share factors, and the head cannot be cut alone"
        )
    return adapter


def truncate_attached(
    model: nn.Module,
    *,
    energy: float | None = None,
    rank: int | None = None,
    adapter: str = "default",
) -> Truncation:
    """Truncates an attached adapter in place, for evaluation before it is saved.

    Args:
        model: A model with LoRA layers.
        energy: As for :func:`truncate`.
        rank: The same.
        adapter: Name of the adapter.

    Raises:
        UserError: As :func:`truncate`, or when the model has no such adapter.
    """
    _check(energy, rank)
    factors = {
        name: layers.factors_of(layer, adapter)
        for name, layer in layers.lora_layers(model, adapter).items()
    }
    spectra = spectrum.of_all(factors)
    ranks = _ranks(factors, spectra, energy, rank)
    resizing.resize(model, ranks, adapter=adapter)
    return _report(factors, spectra, ranks)


def sizes(
    factors: Mapping[str, Factors],
    energies: Iterable[float] = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0),
) -> list[Size]:
    """Says what keeping each share of the energy would take, such as of a saved adapter."""
    spectra = spectrum.of_all(factors)
    found = []
    for energy in energies:
        _check(energy, None)
        ranks = _ranks(factors, spectra, energy, None)
        report = _report(factors, spectra, ranks)
        found.append(
            Size(
                energy=energy,
                ranks=ranks,
                parameters=report.parameters_after,
                error=max(report.errors.values()),
            )
        )
    return found


def bytes_of(folder: str | Path) -> int:
    """Returns the bytes of a folder's files."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _check(energy: float | None, rank: int | None) -> None:
    if (energy is None) == (rank is None):
        raise UserError("truncate takes either an energy or a rank")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is a share over 0 and at most 1, not {energy}")
    if rank is not None and rank < 1:
        raise UserError(f"rank is at least 1, not {rank}")


def _ranks(
    factors: Mapping[str, Factors],
    spectra: Mapping[str, Spectrum],
    energy: float | None,
    rank: int | None,
) -> dict[str, int]:
    # A layer whose update is zero keeps one direction: an adapter has no layers of rank 0.
    return {
        name: max(1, min(one.rank, rank or spectra[name].energy_rank(energy or 1.0)))
        for name, one in factors.items()
    }


def _report(
    factors: Mapping[str, Factors], spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]
) -> Truncation:
    errors = {}
    for name, found in spectra.items():
        lost = float((found.values[ranks[name] :] ** 2).sum())
        errors[name] = (lost / found.energy) ** 0.5 if found.energy else 0.0
    return Truncation(
        before={name: one.rank for name, one in factors.items()},
        after=dict(ranks),
        errors=errors,
        parameters_before=sum(one.parameters for one in factors.values()),
        parameters_after=sum(ranks[name] * sum(one.shape) for name, one in factors.items()),
    )
