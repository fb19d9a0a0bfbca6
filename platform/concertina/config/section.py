"""What do all sections of a job file share: strictness, bounds, and how they say that keys do not fit each other?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Fraction", "Misfits", "NonNegative", "Positive", "Section"]


def _whole(value: Any) -> Any:
    """`2e7` is a float in YAML and a count to a person."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Misfits(ValueError):
    """Keys that do not fit each other: (key below the section, what is wrong) of each."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(text for _, text in problems))
        self.problems = tuple(problems)


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, docstrings under fields become descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
