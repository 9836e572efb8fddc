"""How much each layer needs rank: the numbers by which :mod:`.allocation` shares a budget out."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping

import numpy as np

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.rank.spectrum import Spectrum


def of_spectra(spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    """Effective rank * log(1 + largest singular value).

    Of the base weights this is the importance called ``weight``, of the updates of an adapter
    already trained it is ``delta``.
    """
    return {
        name: one.effective_rank * float(np.log1p(one.spectral_norm))
        for name, one in spectra.items()
    }


def of_gradients(spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    """The energy of each layer's gradient, sum of sigma^2: how fast its weight could improve."""
    return {name: one.energy for name, one in spectra.items()}


def of_activations(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, float]:
    """How many of the ``budget`` largest components of all layers' inputs a layer has.

    Components are compared by the share of their layer's energy that they explain (EVA, Paischer
    et al. 2024, arXiv 2410.07170, section 3.2). With ``budget`` the number of ranks to be shared
    out, these are EVA's ranks; unlike PEFT's they count inputs as they are, not less their mean.

    Raises:
        UserError: When the budget is less than 1.
    """
    if budget < 1:
        raise UserError(f"the budget is at least 1, not {budget}")
    names = list(spectra)
    shares = [one.values**2 / (one.energy or 1.0) for one in spectra.values()]
    owners = np.repeat(np.arange(len(names)), [len(share) for share in shares])
    largest = np.argsort(-np.concatenate(shares), kind="stable")[:budget]
    counts = np.bincount(owners[largest], minlength=len(names))
    return {name: float(count) for name, count in zip(names, counts, strict=True)}


def uniform(names: Iterable[str]) -> dict[str, float]:
    """The same for all."""
    return dict.fromkeys(names, 1.0)
