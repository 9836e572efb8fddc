"""The arguments that all samplers of this package have, checked."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optuna_lora_rl.errors import UserError
from optuna_lora_rl.policy.roles import ROLES
from optuna_lora_rl.samplers import is_whole


def checked_seed(seed: int | None) -> int:
    """Returns the seed, a fresh one for ``None``."""
    if seed is None:
        return fresh_seed()
    if not (is_whole(seed) and seed >= 0):
        raise UserError(f"seed is {seed!r}, but must be a whole number, at least 0")
    return int(seed)


def fresh_seed() -> int:
    """Returns a seed that differs from call to call."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def checked_roles(roles: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the roles by parameter name, none for ``None``."""
    for name, role in (roles or {}).items():
        if role not in (*ROLES, "none"):
            raise UserError(
                f"roles: {name} is {role!r}, but must be one of {', '.join(ROLES)}, none"
            )
    return dict(roles or {})
