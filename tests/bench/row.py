"""One line of the benchmark's table: what was measured, against a floor of the same run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """``measured_s`` is at most ``limit_ratio`` times ``floor_s``, the least that it could have been."""

    what: str
    measured_s: float
    floor_s: float
    limit_ratio: float

    @property
    def ratio(self) -> float:
        """How many times the floor it took."""
        return self.measured_s / self.floor_s

    @property
    def is_met(self) -> bool:
        """Whether it is within its limit."""
        return self.ratio <= self.limit_ratio
