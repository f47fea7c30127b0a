"""Speed and memory, each beside a floor or limit of the same run: ``make bench``. Never a test."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys

from tests.bench.row import Row

PARTS = ("hook", "claims", "status", "wrapper", "helper", "relay")


def main() -> int:
    """Measure all parts, or those that are named; print a table."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("part", nargs="*", default=PARTS, metavar="PART", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="for machines")
    words = parser.parse_args()
    if unknown := [part for part in words.part if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    rows: list[Row] = []
    for part in words.part:
        print(f"measuring {part} ...", file=sys.stderr, flush=True)
        rows += importlib.import_module(f"tests.bench.{part}").rows()
    if words.json:
        print(json.dumps([row_json(row) for row in rows], indent=2))
        return 0
    width = max(len(row.what) for row in rows)
    print(f"{'what':{width}}  {'measured':>10}  {'floor':>10}  {'ratio':>6}  {'at most':>7}")
    for row in rows:
        measured, floor = quantity(row.measured, row.unit), quantity(row.floor, row.unit)
        ratios = f"{row.ratio:6.2f}  {row.limit_ratio:7.2f}{'' if row.is_met else '  missed'}"
        print(f"{row.what:{width}}  {measured:>10}  {floor:>10}  {ratios}")
    load = os.getloadavg()[0]
    print(f"\n{os.cpu_count()} cores, load {load:.1f}: ratios are of one run; times are this machine's.")
    return 0


def row_json(row: Row) -> dict[str, object]:
    """A row for machines."""
    return {
        "what": row.what,
        "measured": row.measured,
        "floor": row.floor,
        "unit": row.unit,
        "ratio": round(row.ratio, 4),
        "limit": row.limit_ratio,
        "met": row.is_met,
    }


def quantity(value: float, unit: str) -> str:
    """A number with its unit, three digits of it."""
    if unit != "s":
        return f"{value:.3g} {unit}"
    for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1 or name == "us":
            return f"{value * factor:.3g} {name}"
    return f"{value:g} s"


if __name__ == "__main__":
    sys.exit(main())
