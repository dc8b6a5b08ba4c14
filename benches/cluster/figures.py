"""The result as two SVG files: how every node came on over time, and what larger clusters cost against the bound."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from table import grouped, is_timed

INK, PALE, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ["#0b6e99", "#c2571a", "#3d7a3d"]
FONT = "font-family='system-ui, sans-serif' font-size='12'"
PROGRESS = ["cold burst", "staggered", "warm seed", "home killed", "holder stopped", "partitioned"]
HEALTHY = ["cold burst", "staggered", "warm seed"]
MIB = 1 << 20
LEGEND_Y = 24
GOAL = 1.10
"""The last node of real daemons, against the bound."""


class Panel:
    """One pair of axes at a place in the picture; values are mapped linearly, the zero at the lower left."""

    WIDTH, HEIGHT = 300, 170

    def __init__(self, left: float, top: float, right_value: float, top_value: float, low_value: float = 0.0) -> None:
        self._left, self._top = left, top
        self._right_value, self._low, self._high = right_value, low_value, top_value
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        return self._left + value / self._right_value * self.WIDTH

    def y(self, value: float) -> float:
        return self._top + self.HEIGHT * (1 - (value - self._low) / (self._high - self._low))

    def title(self, text: str) -> None:
        self.text(self._left, self._top - 10, text, weight="600")

    def text(self, x: float, y: float, text: str, anchor: str = "start", colour: str = INK, weight: str = "400") -> None:
        self.parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{colour}' font-weight='{weight}'>{escape(text)}</text>"
        )

    def across(self, values: Iterable[tuple[float, str]]) -> None:
        """Horizontal grid lines with their labels."""
        for value, label in values:
            y = self.y(value)
            self.parts.append(
                f"<line x1='{self._left}' y1='{y:.1f}' x2='{self._left + self.WIDTH}' y2='{y:.1f}' stroke='{GRID}'/>"
            )
            self.text(self._left - 6, y + 4, label, "end", PALE)

    def along(self, values: Iterable[tuple[float, str]]) -> None:
        """Labels below."""
        for value, label in values:
            self.text(self.x(value), self._top + self.HEIGHT + 16, label, "middle", PALE)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.2, dashes: str = "") -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        dashed = f" stroke-dasharray='{dashes}'" if dashes else ""
        self.parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width}'{dashed}/>")

    def dot(self, x: float, y: float, colour: str, radius: float = 2.2) -> None:
        self.parts.append(
            f"<circle cx='{self.x(x):.1f}' cy='{self.y(y):.1f}' r='{radius}' fill='{colour}' fill-opacity='0.45'/>"
        )


def draw(result: dict, directory: Path) -> None:
    (directory / "cluster-progress.svg").write_text(progress(result))
    (directory / "cluster-scaling.svg").write_text(scaling(result))


def progress(result: dict) -> str:
    """Small multiples: MiB held by each node over seconds, in the largest cluster that played each scenario."""
    shown = []
    for name in PROGRESS:
        played = [one for one in result["progress"] if one["scenario"] == name]
        if played:
            shown.append(max(played, key=lambda one: one["nodes"]))
    panels = [_progress_panel(one, result["size"] / MIB, *_place(number, 3)) for number, one in enumerate(shown)]
    return _picture(panels, 3, "MiB held by each node over seconds; dashed: the least time that the links allow")


def _progress_panel(played: dict, size_mib: float, left: float, top: float) -> Panel:
    ends = [points[-1][0] for points in played["lines"].values() if points]
    panel = Panel(left, top, max([*ends, played["bound_s"]]) * 1.03, size_mib)
    panel.title(f"{played['scenario']}, {played['nodes']} nodes")
    panel.across((share * size_mib, f"{share * size_mib:.0f}") for share in (0, 0.25, 0.5, 0.75, 1))
    panel.along((second, f"{second:g}") for second in _ticks(panel._right_value))
    for points in played["lines"].values():
        panel.line([(at, held / MIB) for at, _, held in points], COLOURS[0])
    panel.line([(played["bound_s"], 0), (played["bound_s"], size_mib)], COLOURS[1], 1.4, "5 3")
    return panel


def scaling(result: dict) -> str:
    """Completion against the bound, and what the origin sent, over the number of nodes."""
    groups = {key: runs for key, runs in grouped(result["rows"]).items() if key[0] in HEALTHY}
    counts = sorted({nodes for _, nodes in groups})
    timed = [row["over_bound"] for runs in groups.values() for row in runs if is_timed(row)]
    highest = max([1.2, *timed]) * 1.02
    over = Panel(*_place(0, 2), len(counts) + 1, highest, 0.9)
    over.title("Last node ÷ bound")
    over.across((value, f"{value:.1f}") for value in _steps(0.9, highest, 0.1))
    over.line([(0, GOAL), (len(counts) + 1, GOAL)], PALE, 1.2, "5 3")
    ratio = Panel(*_place(1, 2), len(counts) + 1, 1.25, 0.0)
    ratio.title("Bytes from the origin ÷ size")
    ratio.across((value, f"{value:.2f}") for value in (0, 0.25, 0.5, 0.75, 1, 1.25))
    for panel in (over, ratio):
        panel.along((at, f"N = {nodes}") for at, nodes in enumerate(counts, start=1))
    for number, name in enumerate(HEALTHY):
        _series(over, groups, counts, name, "over_bound", COLOURS[number], is_timed)
        _series(ratio, groups, counts, name, "origin_ratio", COLOURS[number], lambda _: True)
        ratio.text(ratio.x(0) + 95 * number, LEGEND_Y, name, colour=COLOURS[number], weight="600")
    caption = f"Dots: runs; lines: medians; dashed: the goal, {GOAL:.2f}"
    return _picture([over, ratio], 2, caption)


def _series(
    panel: Panel, groups: dict, counts: list, name: str, measure: str, colour: str, counted: Callable[[dict], bool]
) -> None:
    points = []
    for at, nodes in enumerate(counts, start=1):
        values = [row[measure] for row in groups.get((name, nodes), []) if counted(row)]
        for value in values:
            panel.dot(at, value, colour)
        if values:
            points.append((at, statistics.median(values)))
    if points:
        panel.line(points, colour, 1.6)


def _place(number: int, columns: int) -> tuple[float, float]:
    return 50 + (number % columns) * (Panel.WIDTH + 60), 60 + (number // columns) * (Panel.HEIGHT + 70)


def _picture(panels: list[Panel], columns: int, caption: str) -> str:
    rows = -(-len(panels) // columns)
    width, height = columns * (Panel.WIDTH + 60) + 20, rows * (Panel.HEIGHT + 70) + 40
    parts = "\n".join(part for panel in panels for part in panel.parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' {FONT}>\n"
        f"<rect width='{width}' height='{height}' fill='white'/>\n"
        f"<text x='50' y='{LEGEND_Y}' fill='{PALE}'>{escape(caption)}</text>\n{parts}\n</svg>\n"
    )


def _ticks(highest: float) -> list[float]:
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50, 100) if highest / step <= 7)
    return _steps(0, highest, step)


def _steps(low: float, high: float, step: float) -> list[float]:
    return [low + step * number for number in range(int((high - low) / step + 1e-9) + 1)]
