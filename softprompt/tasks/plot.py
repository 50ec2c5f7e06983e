"""Figures: one training run, two runs side by side, and the vectors of a prompt."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from softprompt.files import atomic_write
from softprompt.prompts.inspection import Inspection, norm_quantiles, token_text
from softprompt.tasks.compare import Side, largest_difference

GREY, BLUE, ORANGE, GREEN = "#8a8f98", "#2563eb", "#ea7317", "#15924f"
NAMED_TOKENS = 40  # as many rows of a similarity matrix have room for names
STYLE = {
    "axes.edgecolor": "#c9ccd1",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.labelcolor": "#4b5058",
    "font.size": 9.5,
    "grid.color": "#eceef1",
    "legend.frameon": False,
    "xtick.color": "#4b5058",
    "ytick.color": "#4b5058",
}


@contextmanager
def new_figure(size: tuple[float, float], path: str | Path, title: str = "") -> Iterator[Figure]:
    """Yield an empty figure with a title, which is written as a .png at the end of the block."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        if title:
            figure.suptitle(literal(title), fontsize=12, fontweight="bold", x=0.01, ha="left")
        yield figure
        save_figure(figure, path)


def draw_training(metrics: dict[str, Any], path: str | Path) -> None:
    """Draw losses and accuracies over the steps of a run, and what is right without a trained prompt.

    Of a generation task it is how near what is written is to the targets, with the prompt and without it.

    Args:
        metrics: the content of the run's metrics.json.
        path: of the figure.
    """
    history = metrics["history"]
    with new_figure((9, 3.6), path) as figure:
        left, right = figure.subplots(1, 2)
        losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        left.plot(*_columns(losses), color=GREY, linewidth=1.2, label="training")
        written = "eval_rouge_l" in metrics
        unit = f"nats per {'target' if written else 'label'} token"
        left.set(title="Loss", xlabel="step", ylabel=unit, ylim=(0, None))
        _watched(left, metrics, "loss", BLUE)
        if written:
            _draw_written(right, metrics)
        else:
            draw_accuracy(right, metrics)
        for axes in (left, right):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)


def draw_accuracy(axes: Any, metrics: dict[str, Any]) -> None:
    """Draw the accuracies over the steps of a run, and what is right without a trained prompt."""
    axes.set(title="Accuracy", xlabel="step", ylabel="share of rows", ylim=(-0.03, 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _watched(axes, metrics, "exact_match", GREEN)
    accuracy = metrics["eval_exact_match"]
    if accuracy is None:
        axes.text(0.5, 0.5, "no evaluation rows", transform=axes.transAxes, ha="center", color=GREY)
        return
    at = metrics["steps"] if metrics["best_step"] is None else metrics["best_step"]
    label = f"all {metrics['eval_rows']:,} evaluation rows: {accuracy:.1%}"
    axes.plot([at], [accuracy], "*", color=ORANGE, markersize=11, label=label)
    for name, share, style in (
        ("without a prompt", metrics["zero_shot"]["exact_match"], ":"),
        (f"always {metrics['majority']['label']!r}", metrics["majority"]["exact_match"], "--"),
    ):
        text = literal(f"{name}: {share:.1%}")
        axes.axhline(share, color=GREY, linewidth=1, linestyle=style, label=text)


def _draw_written(axes: Any, metrics: dict[str, Any]) -> None:
    axes.set(title="What is written, beside its targets", ylabel="of 100", ylim=(0, 115))
    zero_shot = metrics["zero_shot"]
    if zero_shot is None:
        axes.text(0.5, 0.5, "no evaluation rows", transform=axes.transAxes, ha="center", color=GREY)
        return
    trained = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    rows, before = metrics["eval_written_rows"], zero_shot["rows"]
    for offset, scores, color, label in (
        (-0.2, zero_shot, GREY, f"without a prompt ({before:,} rows)"),
        (0.2, trained, GREEN, f"with the prompt ({rows:,} rows)"),
    ):
        heights = [100 * scores["exact_match"], 100 * scores["rouge_l"], scores["bleu"]]
        places = [place + offset for place in range(3)]
        bars = axes.bar(places, heights, color=color, width=0.4, label=label)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], padding=2)
    axes.set_xticks(range(3), ["exact match", "ROUGE-L", "BLEU"])


def _watched(axes: Any, metrics: dict[str, Any], score: str, color: str) -> None:
    """A score over the steps, on the validation rows where there are any."""
    history = metrics["history"]
    validation = any("eval_validation_loss" in entry for entry in history)
    prefix, rows = ("eval_validation", "validation") if validation else ("eval", "evaluation")
    found = [entry for entry in history if f"{prefix}_loss" in entry]
    if found:
        points = [(entry["step"], entry[f"{prefix}_{score}"]) for entry in found]
        axes.plot(*_columns(points), color=color, marker="o", markersize=4, label=f"{rows} rows")


def draw_comparison(plain: Side, patched: Side, path: str | Path, *, title: str) -> None:
    """Draw the loss curves, the time of a step, its peak memory and the accuracy of two sides."""
    with new_figure((11, 6.2), path, title) as figure:
        axes: dict[str, Any] = figure.subplot_mosaic([["loss"] * 3, ["time", "memory", "accuracy"]])
        draw_losses(axes["loss"], plain, patched)
        draw_costs(axes["time"], axes["memory"], plain, patched)
        _accuracy_bars(axes["accuracy"], plain, patched)


def draw_losses(axes: Any, plain: Side, patched: Side) -> None:
    """Draw the training losses of two sides, one over the other."""
    steps = range(1, len(plain.losses) + 1)
    axes.plot(steps, plain.losses, color=ORANGE, linewidth=4, alpha=0.45, label=plain.name)
    axes.plot(steps, patched.losses, color=BLUE, linewidth=1.3, label=patched.name)
    gap = largest_difference(plain, patched)
    axes.set(
        title=f"Training loss on the same batches: largest difference {gap:.1e}",
        xlabel="step",
        ylabel="nats per label token",
    )
    axes.legend()


def draw_costs(time: Any, memory: Any, plain: Side, patched: Side) -> None:
    """Draw the time of a step of two sides, and its peak memory."""
    names = [plain.name, patched.name]
    times = [plain.median_milliseconds, patched.median_milliseconds]
    sizes = [plain.peak_bytes / 2**20, patched.peak_bytes / 2**20]
    _bars(time, names, times, f"Time per step: {times[0] / times[1]:.1f} : 1", "ms (median)", "{:,.1f}")
    _bars(memory, names, sizes, f"Peak memory: {sizes[0] / sizes[1]:.1f} : 1", "MiB", "{:,.2f}")


def draw_inspection(found: Inspection, tokenizer: Any, path: str | Path, *, title: str) -> None:
    """Draw how alike virtual tokens are, their norms, their nearest tokens and how far they moved."""
    count, moved = len(found.norms), found.movement
    right = ["norm", "cosine"] if moved is None else ["norm", "cosine", "moved"]
    named = count <= NAMED_TOKENS
    with new_figure((12, 6.2), path, title) as figure:
        axes: dict[str, Any] = figure.subplot_mosaic(
            [["similarity", name] for name in right], width_ratios=[1.15, 1]
        )
        _draw_similarity(figure, axes["similarity"], found, tokenizer if named else None)
        places = range(count)
        low, middle, high = norm_quantiles(found.vocabulary_norms)
        axes["norm"].axhspan(low, high, color=GREY, alpha=0.18, linewidth=0, label="90 % of the vocabulary")
        axes["norm"].axhline(middle, color=GREY, linewidth=1, label="its median")
        axes["norm"].plot(places, found.norms.numpy(), "o", color=BLUE, markersize=4, label="virtual tokens")
        axes["norm"].set(title="Norm", ylabel="L2", ylim=(0, 1.35 * max(high, float(found.norms.max()))))
        axes["norm"].legend(ncols=3, loc="upper left", fontsize=8)
        axes["cosine"].bar(places, found.by_cosine.values[:, 0].numpy(), color=GREEN, width=0.7)
        axes["cosine"].set(title="Cosine with the nearest token", ylim=(0, 1.05))
        if moved is not None:
            axes["moved"].bar(places, moved.distance.numpy(), color=ORANGE, width=0.7)
            axes["moved"].set(title="Distance from the start", ylabel="L2")
        for name in right:
            axes[name].set(xlim=(-0.7, count - 0.3))
            axes[name].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[right[-1]].set(xlabel="virtual token")


def _draw_similarity(figure: Figure, axes: Any, found: Inspection, tokenizer: Any) -> None:
    image = axes.imshow(found.similarity.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(title="Cosine between virtual tokens", xlabel="virtual token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if tokenizer is not None:
        nearest = [token_text(tokenizer, int(i)) for i in found.by_cosine.token_ids[:, 0]]
        names = [f"{_plain(text)}  {place}" for place, text in enumerate(nearest)]
        axes.set_yticks(range(len(names)), names, fontsize=min(9.5, 270 / len(names)))
        axes.set(ylabel="nearest token, virtual token")
    figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02)


def _plain(text: str) -> str:
    """A token that a figure has room for; its quotes make spaces visible."""
    shown = repr(text)
    return literal(shown if len(shown) <= 18 else f"{shown[:16]}…'")


def literal(text: str) -> str:
    """Return a text for a figure, in which dollar signs stand for themselves."""
    return text.replace("$", r"\$")  # two of them would hold a formula


def draw_confusion(
    counts: Sequence[Sequence[int]], labels: Sequence[str], path: str | Path, *, title: str
) -> None:
    """Draw how many rows of each label were predicted as each label, shaded by their share of the label."""
    size = len(labels)
    side = 2.4 + min(0.55 * size, 12)
    names = [literal(label if len(label) <= 32 else f"{label[:31]}…") for label in labels]
    slanted = size > 3 or max(map(len, names)) > 14
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side + 1.2, side))
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(title=literal(title), xlabel="predicted", ylabel="label in the table")
        axes.set_xticks(
            range(size), names, rotation=40 if slanted else 0, ha="right" if slanted else "center"
        )
        axes.set_yticks(range(size), names)
        if size <= 25:
            for row in range(size):
                for column in range(size):
                    colour = "white" if shares[row][column] > 0.5 else "#4b5058"
                    axes.text(column, row, str(counts[row][column]), ha="center", va="center", color=colour)
        bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), shrink=0.8)
        bar.set_label("share of the label's rows")
        save_figure(figure, path, whole=True)


def _bars(axes: Any, names: list[str], values: list[float], title: str, unit: str, number: str) -> None:
    bars = axes.bar(names, values, color=[ORANGE, BLUE], width=0.55)
    axes.bar_label(bars, [number.format(value) for value in values], padding=2)
    axes.set(title=title, ylabel=unit, ylim=(0, 1.15 * max(values)))


def _accuracy_bars(axes: Any, plain: Side, patched: Side) -> None:
    heights = [plain.accuracy_before, plain.accuracy_after, patched.accuracy_after]
    names = ["before", f"after\n{plain.name}", f"after\n{patched.name}"]
    bars = axes.bar(names, heights, color=[GREY, ORANGE, BLUE], width=0.6)
    axes.bar_label(bars, [f"{height:.0%}" for height in heights], padding=2)
    axes.set(title="Accuracy", ylabel="exact match", ylim=(0, 1.15))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def save_figure(figure: Figure, path: str | Path, *, whole: bool = False) -> None:
    """Write a figure as a .png; no half-written file is ever left under the name.

    With `whole` it is as large as its texts need, however long they are.
    """
    FigureCanvasAgg(figure)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150, bbox_inches="tight" if whole else None)
