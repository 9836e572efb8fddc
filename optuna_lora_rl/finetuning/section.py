"""A section of a study's file."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic import ConfigDict


class Section(BaseModel):
    """Keys and values that cannot be changed, none of them unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
