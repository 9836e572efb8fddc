from __future__ import annotations

import numpy as np
import pytest

from optuna_lora_rl.pruners.extrapolation import EXPONENTS
from optuna_lora_rl.pruners.extrapolation import extrapolate
from optuna_lora_rl.pruners.extrapolation import fit

t = np.arange(1.0, 9.0)


def power_laws(count: int, *, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    end, height = rng.normal(0.7, 0.1, count), rng.uniform(0.1, 0.5, count)
    exponent = rng.choice(EXPONENTS[2:6], count)
    clean = end[:, None] - height[:, None] * t ** -exponent[:, None]
    return clean + noise * rng.normal(size=clean.shape)


def test_a_power_law_is_fitted_exactly_whatever_reports_are_missing() -> None:
    curve = 0.9 - 0.4 * t**-0.75
    for missing in ([], [0], [3, 4], [0, 7]):
        y = curve.copy()
        y[missing] = np.nan
        fits = fit(t, y[None, :])
        best = int(np.argmin(fits.error[0]))
        assert EXPONENTS[best] == 0.75
        assert fits.end[0, best] == pytest.approx(curve[-1])
        assert fits.points[0] == 8 - len(missing)


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.03])
def test_the_noise_of_power_laws_is_found(noise: float) -> None:
    found = np.median(fit(t, power_laws(400, noise=noise)).noise())
    assert found == pytest.approx(noise, rel=0.25)


def test_three_reports_say_nothing_of_the_noise() -> None:
    y = power_laws(1, noise=0.01)
    y[:, 3:] = np.nan
    assert np.isnan(fit(t, y).noise()).all()


@pytest.mark.parametrize("seen", [1, 2, 4, 6])
def test_forecasts_are_as_uncertain_as_they_say(seen: int) -> None:
    y = power_laws(300, noise=0.01, seed=1)
    finished = power_laws(15, noise=0.01, seed=2)
    ends = extrapolate(t, np.where(t <= seen, y, np.nan), finished, noise=0.01)
    z = (y[:, -1] - ends.mean) / ends.deviation
    assert 0.6 < np.sqrt(np.mean(z**2)) < 1.4
    # What was promised with a chance of one in ten or less seldom comes true.
    target = float(np.quantile(y[:, -1], 0.9))
    unlikely = ends.chance(target) < 0.1
    assert np.mean(y[unlikely, -1] >= target) < 0.1


def test_more_reports_make_better_forecasts() -> None:
    y = power_laws(300, noise=0.005, seed=1)
    finished = power_laws(15, noise=0.005, seed=2)
    errors = [
        np.mean(np.abs(y[:, -1] - ends.mean))
        for seen in (1, 3, 6)
        for ends in [extrapolate(t, np.where(t <= seen, y, np.nan), finished, noise=0.005)]
    ]
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


def test_a_schedule_that_flattens_all_curves_is_learned_from_the_finished_ones() -> None:
    # No power law stops climbing at once; the finished curves all did.
    curves = power_laws(20, noise=0.0, seed=3)
    curves[:, 5:] = curves[:, 5:6]
    own, finished = curves[:1].copy(), curves[1:]
    end = own[0, -1]
    own[0, 6:] = np.nan
    learned = extrapolate(t, own, finished, noise=0.001)
    ignorant = extrapolate(t, own, power_laws(19, noise=0.0, seed=3), noise=0.001)
    assert abs(learned.mean[0] - end) < 0.5 * abs(ignorant.mean[0] - end)


def test_curves_are_forecast_each_by_itself() -> None:
    y = np.where(t <= 3, power_laws(6, noise=0.01), np.nan)
    y[3:, 2] = np.nan
    finished = power_laws(9, noise=0.01, seed=2)
    together = extrapolate(t, y, finished, noise=0.01)
    # The vague prior knows the spread of what is asked about; it fades behind the finished ones.
    alone = [extrapolate(t, row[None, :], finished, noise=0.01).mean[0] for row in y]
    assert np.allclose(together.mean, alone, atol=0.02)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_do_not_matter(scale: float) -> None:
    y = np.where(t <= 3, power_laws(4, noise=0.01), np.nan)
    finished = power_laws(9, noise=0.01, seed=2)
    ends = extrapolate(t, y, finished, noise=0.01)
    scaled = extrapolate(10 * t, scale * y, scale * finished, noise=scale * 0.01)
    assert np.allclose(scaled.mean, scale * ends.mean)
    assert np.allclose(scaled.chance(0.7 * scale), ends.chance(0.7))


def test_equal_flat_curves_and_no_noise_are_no_obstacle() -> None:
    y = np.full((1, 8), np.nan)
    y[0, 0] = 0.5
    ends = extrapolate(t, y, np.full((3, 8), 0.5), noise=0.0)
    assert abs(ends.mean[0] - 0.5) < 0.05
    assert np.isfinite(ends.deviation).all()
