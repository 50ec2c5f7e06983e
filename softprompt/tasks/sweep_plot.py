"""The figure of a sweep: every run as a dot, and the mean and spread of each setting."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator, PercentFormatter

from softprompt.tasks.plot import BLUE, GREEN, GREY, ORANGE, literal, new_figure

COLOURS = (BLUE, ORANGE, GREEN, "#9333ea", "#c2255c", "#0e7490", "#8a6d1f", GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS = (
    ("eval_exact_match", "Accuracy on the evaluation rows", "exact match"),
    ("eval_loss", "Loss on the evaluation rows", "nats per label token"),
)
LOGARITHMIC = 8  # an axis is, where the largest value is as many times the smallest one
LOGARITHMIC_LOSS = 20

Rows = Sequence[Mapping[str, Any]]


def draw_sweep(rows: Rows, fields: Sequence[str], path: str | Path, *, title: str) -> None:
    """Draw accuracy and loss over the first field of numbers, with a line for each value of the others.

    Dots are runs, lines go through the means, and bands or bars reach from the lowest run to the highest.
    Runs that diverged are left out of the means and named below the figure.

    Args:
        rows: of `table_of`.
        fields: swept over, one or more.
        path: of the .png.
        title: above the figure.
    """
    across = next((name for name in fields if _is_number_field(rows, name)), fields[0])
    others = [name for name in fields if name != across]
    series: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        series.setdefault(tuple(row[name] for name in others), []).append(row)
    values = list(dict.fromkeys(row[across] for row in rows))
    numbers = _is_number_field(rows, across)
    # Named settings stand side by side; numbers have their place on the axis.
    place_of = {value: value if numbers else place for place, value in enumerate(values)}
    spread = 0.0 if numbers else min(0.22, 0.7 / len(series))
    beside = 0.0 if numbers else min(0.13, 0.25 / len(series))
    with new_figure((10.5, 4.4), path, title) as figure:
        panels = figure.subplots(1, 2)
        for axes, (score, heading, unit) in zip(panels, PANELS, strict=True):
            axes.set(title=heading, xlabel=_words(across), ylabel=unit)
            if numbers:
                _number_axis(axes, sorted(values))
            else:
                _name_axis(axes, values)
            for place, (key, group) in enumerate(series.items()):
                found: dict[Any, list[float]] = {}
                for row in group:
                    if not row["diverged"] and row[score] is not None:
                        found.setdefault(row[across], []).append(row[score])
                shift = (place - (len(series) - 1) / 2) * spread
                runs = {place_of[value] + shift: scores for value, scores in found.items()}
                style = {
                    "color": COLOURS[place % len(COLOURS)],
                    "marker": MARKERS[place % len(MARKERS)],
                    "label": literal(", ".join(map(str, key))),
                }
                _draw_series(axes, dict(sorted(runs.items())), beside, style)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        _limits(panels[0], rows, "eval_exact_match", top=1.0)
        _limits(panels[1], rows, "eval_loss", top=None)
        _add_legend(figure, panels[0], others, len(series))
        figure.supxlabel(_footnote(rows), fontsize=8.5, color=GREY, x=0.01, ha="left")


def _draw_series(axes: Any, runs: Mapping[float, list[float]], beside: float, style: dict[str, Any]) -> None:
    """Draw the scores at each place of the axis, dots `beside` their mean, or a band where that is 0."""
    places, colour = list(runs), style["color"]
    means = [statistics.fmean(scores) for scores in runs.values()]
    lowest, highest = [min(scores) for scores in runs.values()], [max(scores) for scores in runs.values()]
    for x, scores in runs.items():
        axes.plot([x + beside] * len(scores), scores, "o", color=colour, markersize=3.5, alpha=0.4, zorder=2)
    if not beside:
        axes.fill_between(places, lowest, highest, color=colour, alpha=0.13, linewidth=0)
        axes.plot(places, means, markersize=6, linewidth=1.6, zorder=3, **style)
        return
    below = [mean - low for mean, low in zip(means, lowest, strict=True)]
    above = [high - mean for mean, high in zip(means, highest, strict=True)]
    bars = {"linestyle": "none", "capsize": 3, "elinewidth": 1.1}
    axes.errorbar(places, means, yerr=[below, above], markersize=7, zorder=3, **bars, **style)


def _number_axis(axes: Any, values: Sequence[float]) -> None:
    if values[0] > 0 and values[-1] >= LOGARITHMIC * values[0]:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name_axis(axes: Any, values: Sequence[Any]) -> None:
    names = [_short(value) for value in values]
    crowded = sum(map(len, names)) > 45
    axes.set_xticks(
        range(len(values)), names, rotation=25 if crowded else 0, ha="right" if crowded else "center"
    )
    axes.set_xlim(-0.6, len(values) - 0.4)


def _limits(axes: Any, rows: Rows, score: str, *, top: float | None) -> None:
    """Leave room around the dots: an accuracy shows how far it is from all, a loss how far from 0."""
    found = [row[score] for row in rows if not row["diverged"] and row[score] is not None]
    if not found:
        axes.text(0.5, 0.5, "every run diverged", transform=axes.transAxes, ha="center", color=GREY)
        return
    if top is not None:
        low = min(found)
        axes.set_ylim(max(-0.03, low - 0.15 * (top - low) - 0.02), top + 0.03)
        return
    if min(found) > 0 and max(found) >= LOGARITHMIC_LOSS * min(found):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.08 * max(found) or 1)


def _add_legend(figure: Figure, axes: Any, others: Sequence[str], count: int) -> None:
    if not others:
        return
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=", ".join(map(_words, others)),
        loc="outside right upper",
        alignment="left",
        ncols=1 if count <= 16 else 2,
    )


def _footnote(rows: Rows) -> str:
    seeds = len({row["seed"] for row in rows})
    text = (
        "one run of each setting"
        if seeds == 1
        else f"mean of {seeds} seeds, from the lowest run to the highest; dots are runs"
    )
    lost = sum(bool(row["diverged"]) for row in rows)
    return text if not lost else f"{text}; {lost} of {len(rows)} runs diverged and are not shown"


def _is_number_field(rows: Rows, name: str) -> bool:
    return all(isinstance(row[name], (int, float)) for row in rows)


def _words(field: str) -> str:
    return field.replace("_", " ").replace("num virtual tokens", "virtual tokens")


def _short(value: Any) -> str:
    text = str(value)
    return literal(text if len(text) <= 22 else f"{text[:20]}…")
