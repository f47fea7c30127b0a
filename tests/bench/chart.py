"""A bar chart as SVG: two bars for each row, drawn to one scale."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

_ROW, _BAR, _LEFT, _WIDTH, _TOP = 26, 10, 330, 900, 48
_COLOURS = ("#3b6ea5", "#e08a3c")


def write_chart(path: Path, title: str, rows: Sequence[tuple[str, float, float]]) -> None:
    """Each row is a name, what goes from the guest and what comes to it; both have the unit of the title."""
    most = max(max(row[1:]) for row in rows)
    height = _TOP + _ROW * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}">',
        "<style>text { font: 12px sans-serif }</style>",
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for number, (colour, words) in enumerate(zip(_COLOURS, ("from the guest", "to the guest"), strict=True)):
        x = _LEFT + 130 * number
        parts.append(f'<rect x="{x}" y="26" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="35">{words}</text>')
    for at, (name, *values) in enumerate(rows):
        y = _TOP + _ROW * at
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        for number, value in enumerate(values):
            width = (_WIDTH - _LEFT - 70) * value / most
            bar = y + 2 + _BAR * number
            parts.append(
                f'<rect x="{_LEFT}" y="{bar}" width="{width:.1f}" height="{_BAR - 1}" '
                f'fill="{_COLOURS[number]}"/>'
            )
            parts.append(f'<text x="{_LEFT + width + 4:.1f}" y="{bar + 9}" font-size="9">{value:.0f}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
