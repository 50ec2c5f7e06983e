import numpy as np
import pytest
from matplotlib.image import imread

from softprompt.tasks.plot import BLUE, ORANGE
from softprompt.tasks.sweep import (
    batches_of_runs,
    best_setting,
    grid,
    read_record,
    summary_of,
    table_of,
)
from softprompt.tasks.sweep_plot import draw_sweep

OVER = {"num_virtual_tokens": [1, 4], "init": ["random", "vocab"]}
SETTINGS = {"num_virtual_tokens": 8, "init": "text", "epochs": 3, "seed": 0}


def pixels_of(path, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    image = (imread(path)[..., :3] * 255).round()
    return int((np.abs(image - wanted).max(-1) < 2).sum())


def row(number, value, seed=1, *, init="random", diverged=False):
    return {
        "num_virtual_tokens": number,
        "init": init,
        "seed": seed,
        "eval_exact_match": None if diverged else value,
        "eval_loss": None if diverged else 1 - value,
        "train_loss": None if diverged else 2 - value,
        "diverged": diverged,
    }


def test_a_grid_has_every_combination_with_every_seed():
    runs = grid(OVER, [5, 6], SETTINGS)
    assert [(*run.values.values(), run.seed) for run in runs] == [
        (length, init, seed) for length in (1, 4) for init in ("random", "vocab") for seed in (5, 6)
    ]
    assert runs[3].settings == {"num_virtual_tokens": 1, "init": "vocab", "epochs": 3, "seed": 6}


def test_the_name_of_a_run_is_that_of_its_settings_alone():
    (here,) = grid({"init": ["vocab"]}, [5], {**SETTINGS, "num_virtual_tokens": 4})
    there = grid(OVER, [4, 5], SETTINGS)[-1]
    assert here.name == there.name
    names = {run.name for run in grid(OVER, [4, 5], SETTINGS)}
    assert len(names) == 8
    assert {run.name for run in grid(OVER, [4, 5], {**SETTINGS, "epochs": 4})}.isdisjoint(names)


def test_runs_are_batched_where_they_have_the_same_settings():
    runs = grid(OVER, [5, 6], SETTINGS)
    assert [len(batch) for batch in batches_of_runs(runs, ["epochs"], together=3)] == [3, 3, 2]
    batches = batches_of_runs(runs, ["epochs", "init"], together=8)
    assert [{run.settings["init"] for run in batch} for batch in batches] == [{"random"}, {"vocab"}]
    assert sorted(run.name for batch in batches for run in batch) == sorted(run.name for run in runs)


@pytest.mark.parametrize("content", [None, "", '{"a": ', "[1]"])
def test_what_is_no_record_is_no_finished_run(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert read_record(tmp_path) is None


def test_the_table_has_the_swept_values_and_the_scores_of_each_run():
    runs = grid({"init": ["vocab"]}, [5, 6], SETTINGS)
    kept = ("eval_exact_match", "eval_loss", "train_loss", "eval_perplexity", "steps", "trainable_parameters")
    records = {
        run.name: {**{name: run.seed + i for i, name in enumerate(kept)}, "diverged": False, "losses": [1.0]}
        for run in runs
    }
    assert table_of(runs, records)[1] == {
        "init": "vocab",
        "seed": 6,
        **{name: 6 + i for i, name in enumerate(kept)},
        "diverged": False,
        "run": runs[1].name,
    }


def test_mean_and_spread_leave_runs_out_that_diverged():
    rows = [row(1, 0.25), row(1, 0.75, 2), row(1, 0, 3, diverged=True), row(4, 0, diverged=True), row(8, 0.5)]
    summary = summary_of(rows, ["num_virtual_tokens"])
    assert [(entry["runs"], entry["diverged"]) for entry in summary] == [(3, 1), (1, 1), (1, 0)]
    assert summary[0]["eval_exact_match"] == pytest.approx(
        {"mean": 0.5, "std": 0.125**0.5, "min": 0.25, "max": 0.75}
    )
    assert summary[1]["eval_loss"] is None
    assert summary[2]["eval_loss"] == {"mean": 0.5, "std": None, "min": 0.5, "max": 0.5}


def test_the_best_setting_is_accurate_and_then_of_little_loss_and_never_diverges():
    rows = [row(1, 0.5), row(2, 0.75), row(4, 0.75), row(8, 0.9), row(8, 0, 2, diverged=True)]
    rows[2]["eval_loss"] = 0.1
    assert best_setting(summary_of(rows, ["num_virtual_tokens"]))["num_virtual_tokens"] == 4
    assert best_setting(summary_of(rows[4:], ["num_virtual_tokens"])) is None


@pytest.mark.parametrize("fields", [["num_virtual_tokens"], ["init", "num_virtual_tokens"], ["init"]])
def test_the_figure_draws_each_setting(tmp_path, fields):
    inits = ("random", "vocab") if "init" in fields else ("random",)
    lengths = (1, 4, 16) if "num_virtual_tokens" in fields else (1,)
    rows = [row(p, 0.1 * s + 0.01 * p, s, init=i) for p in lengths for i in inits for s in (1, 2, 3)]
    rows.append(row(4, 0, 4, diverged=True))
    draw_sweep(rows, fields, tmp_path / "sweep.png", title="costs $1 or $2")
    assert pixels_of(tmp_path / "sweep.png", BLUE) > 200
    assert (pixels_of(tmp_path / "sweep.png", ORANGE) > 200) is (len(fields) == 2)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]


def test_the_spread_is_as_wide_as_the_runs_lie_apart(tmp_path):
    def band(width):
        rows = [row(length, 0.5 + sign * width, sign) for length in (1, 16) for sign in (-1, 1)]
        draw_sweep(rows, ["num_virtual_tokens"], tmp_path / "sweep.png", title="t")
        return shaded(tmp_path / "sweep.png")

    assert band(0.0) < 100 < 10_000 < band(0.3)


def shaded(path):
    """Pixels of BLUE at 13 % over white."""
    wanted = np.array([255 + 0.13 * (int(BLUE[i : i + 2], 16) - 255) for i in (1, 3, 5)])
    image = imread(path)[..., :3] * 255
    return int((np.abs(image - wanted).max(-1) < 2).sum())


def test_a_sweep_in_which_every_run_diverged_is_drawn(tmp_path):
    draw_sweep([row(1, 0, diverged=True)], ["num_virtual_tokens"], tmp_path / "sweep.png", title="t")
    assert pixels_of(tmp_path / "sweep.png", BLUE) == 0
