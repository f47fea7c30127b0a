"""One line of the benchmark's table: what was measured, against a floor or limit of the same run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """``measured`` is to be at most ``limit_ratio`` times ``floor``; both are in ``unit``."""

    what: str
    measured: float
    floor: float
    limit_ratio: float
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """How many times the floor it took."""
        return self.measured / self.floor

    @property
    def is_met(self) -> bool:
        """Whether it is within its limit."""
        return self.ratio <= self.limit_ratio
