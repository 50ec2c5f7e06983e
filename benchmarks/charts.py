"""The pictures of the README: step times with their floor, and peak memory; one panel a case."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.targets import is_own
from benchmarks.variants import REFERENCE
from softprompt.tasks.plot import BLUE, GREY, ORANGE, STYLE

if TYPE_CHECKING:
    from benchmarks.records import Measured

_BAR, _FRAME = 0.34, 1.05  # inches
_TITLE_WIDTH = 78  # letters
_RED = "#b42318"


@dataclass(frozen=True)
class _Bar:
    name: str
    value: float
    low: float
    high: float
    note: str  # how it compares with PEFT
    color: str = GREY


def draw_times(newest: Sequence[Measured], path: Path) -> Path | None:
    """Step times (bar: median, whisker: p20 to p80), the floor as a line. None where nothing was timed."""

    def bars(found: Measured) -> list[_Bar]:
        return [
            _Bar(
                name,
                1e3 * variant["time"]["p50"],
                1e3 * variant["time"]["p20"],
                1e3 * variant["time"]["p80"],
                _faster(name, variant["time"], found.case),
                _color(variant),
            )
            for name, variant in found.variants.items()
            if variant["time"] is not None
        ]

    return _draw(newest, bars, path, "Time of a training step", "ms", floor=True)


def draw_memory(newest: Sequence[Measured], path: Path) -> Path | None:
    """Peak memory above the weights. None where nothing was measured."""

    def bars(found: Measured) -> list[_Bar]:
        reference = (found.variants.get(REFERENCE.name) or {}).get("peak_bytes")
        return [
            _Bar(
                name,
                variant["peak_bytes"] / 1e6,
                variant["peak_bytes"] / 1e6,
                variant["peak_bytes"] / 1e6,
                ""
                if name == REFERENCE.name or not reference
                else f"{reference / variant['peak_bytes']:.1f}x less",
                _color(variant),
            )
            for name, variant in found.variants.items()
            if variant["peak_bytes"] is not None
        ]

    return _draw(newest, bars, path, "Peak memory of a training step, above the weights", "MB", floor=False)


def draw_kernels(newest: Sequence[Measured], path: Path) -> Path | None:
    """Times of the kernels, the floor as a line. None where nothing was timed."""

    def bars(found: Measured) -> list[_Bar]:
        return [
            _Bar(
                name,
                *(1e6 * variant["time"][key] for key in ("p50", "p20", "p80")),
                f"{variant['time']['p50'] / found.case['floor_seconds']:.1f}x floor",
                _color(variant),
            )
            for name, variant in found.variants.items()
            if variant["time"] is not None
        ]

    return _draw(newest, bars, path, "Time of a kernel", "us", floor=True)


def _faster(name: str, time: dict[str, Any], case: dict[str, Any]) -> str:
    if name == REFERENCE.name or "ratio" not in time:
        return ""
    if case.get("ratio_to", REFERENCE.name) != REFERENCE.name:
        return ""
    return f"{time['ratio']:.1f}x" + (" faster" if time["ratio"] >= 1 else "")


def _color(variant: dict[str, Any]) -> str:
    return BLUE if is_own(variant) else ORANGE if variant["name"] == REFERENCE.name else GREY


def _draw(
    newest: Sequence[Measured],
    bars_of: Callable[[Measured], list[_Bar]],
    path: Path,
    title: str,
    unit: str,
    *,
    floor: bool,
) -> Path | None:
    panels = [(found, bars) for found in newest if (bars := bars_of(found))]
    if not panels:
        return None
    heights = [_FRAME + _BAR * len(bars) for _, bars in panels]
    with mpl.rc_context(STYLE | {"axes.grid.axis": "x", "ytick.left": False, "ytick.color": "#1f2328"}):
        figure = Figure(figsize=(8, 0.5 + sum(heights)), layout="constrained")
        device = newest[0].record["device"]["name"]
        figure.suptitle(f"{title} ({device})", fontsize=13, fontweight="bold", x=0.01, ha="left")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (found, bars) in zip(axes, panels, strict=True):
            _panel(panel, found, bars, unit, found.case["floor_seconds"] if floor else None)
            panel.set_title(textwrap.fill(_title(found.case), _TITLE_WIDTH), fontsize=10)
        partial = path.with_name(f".{path.name}.partial")
        FigureCanvasAgg(figure)
        figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, path)
    return path


def _panel(
    axes: Any,
    found: Measured,
    bars: Sequence[_Bar],
    unit: str,
    floor_seconds: float | None,
) -> None:
    for position, bar in enumerate(bars):
        axes.barh(position, bar.value, height=0.62, color=bar.color)
        if bar.low < bar.high:
            axes.errorbar(
                bar.value,
                position,
                xerr=[[bar.value - bar.low], [bar.high - bar.value]],
                ecolor="#4b5058",
                elinewidth=1,
                capsize=2.5,
            )
        axes.annotate(
            f"{_number(bar.value)} {unit}   {bar.note}".rstrip(),
            (bar.high, position),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85},
        )
    if floor_seconds is not None:
        floor = (1e6 if unit == "us" else 1e3) * floor_seconds
        label = f"floor {_number(floor)} {unit}"
        axes.axvline(floor, color=_RED, linestyle=(0, (4, 2)), linewidth=1.3, label=label)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), labelcolor=_RED, fontsize=9)
    axes.set(
        yticks=range(len(bars)),
        yticklabels=[bar.name for bar in bars],
        xlim=(0, 1.28 * max(bar.high for bar in bars)),
    )
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    axes.invert_yaxis()


def _title(case: dict[str, Any]) -> str:
    if "about" in case:
        return f"{case['name']}: {case['about']}"
    return (
        f"{case['name']}: {case['shape']['name']}, {case['rows']} rows of {case['batch']['padded_length']}, "
        f"P = {case['num_virtual_tokens']}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
