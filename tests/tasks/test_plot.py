import itertools
import os

import numpy as np
import pytest
import torch
from marks import slow_unless
from matplotlib.image import imread
from tiny_models import build

from softprompt import init, inspect_prompt
from softprompt.tasks.compare import Side
from softprompt.tasks.plot import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    draw_comparison,
    draw_confusion,
    draw_inspection,
    draw_training,
)

TRAINING = [{"step": step, "loss": 5.0 / step} for step in range(1, 9)]
EVALUATION = [
    {"step": 4, "eval_loss": 2.0, "eval_exact_match": 0.5},
    {"step": 8, "eval_loss": 1.0, "eval_exact_match": 0.75},
]


def pixels_of(path, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    image = (imread(path)[..., :3] * 255).round()
    return int((np.abs(image - wanted).max(-1) < 2).sum())


@pytest.mark.parametrize("history, evaluated", [(TRAINING + EVALUATION, True), (TRAINING, False)])
def test_the_training_figure_draws_what_was_measured(tmp_path, history, evaluated):
    path = tmp_path / "training.png"
    scores = {"eval_exact_match": None, "steps": 8, "best_step": None, "eval_rows": 40}
    if evaluated:
        scores |= {"eval_exact_match": 0.75, "zero_shot": {"exact_match": 0.25}}
        scores |= {"majority": {"label": "joy", "exact_match": 0.5}}
    draw_training({"history": history, **scores}, path)
    assert pixels_of(path, GREY) > 200
    assert (pixels_of(path, BLUE) > 200) is evaluated
    assert (pixels_of(path, GREEN) > 200) is evaluated
    assert (pixels_of(path, ORANGE) > 20) is evaluated
    assert os.listdir(tmp_path) == ["training.png"]


def test_the_bars_of_the_comparison_are_as_high_as_the_figures(tmp_path):
    def side(name, milliseconds, peak_bytes):
        return Side(name, None, [3.0, 2.0, 1.0, 0.5], [milliseconds] * 4, peak_bytes, 0.0, 0.9)

    draw_comparison(side("plain", 10.0, 2**22), side("fast", 10.0, 2**22), tmp_path / "even.png", title="t")
    draw_comparison(side("plain", 10.0, 2**22), side("fast", 1.0, 2**20), tmp_path / "ahead.png", title="t")
    even, ahead = ({c: pixels_of(tmp_path / f, c) for c in (ORANGE, BLUE)} for f in ("even.png", "ahead.png"))
    assert even[ORANGE] == pytest.approx(even[BLUE], rel=0.1)
    assert ahead[ORANGE] == pytest.approx(even[ORANGE], rel=0.1)
    assert ahead[BLUE] < 0.7 * even[BLUE]


@pytest.mark.parametrize(
    "moved, count", slow_unless({(True, 1), (False, 100)}, itertools.product([True, False], [1, 12, 100]))
)
def test_the_vectors_of_a_prompt_of_any_length_are_drawn(tmp_path, count, moved):
    class Tokenizer:
        def decode(self, ids):
            return " $x_1$ and a very long token\n" * ids[0]

    model = build("llama", torch.float32)
    prompt = init.matched(model, count, seed=0)
    found = inspect_prompt(model, prompt, initial=prompt + 1 if moved else None)
    path = tmp_path / "seen.png"
    draw_inspection(found, Tokenizer(), path, title="a prompt of $P")
    assert pixels_of(path, GREEN) > 1000
    assert pixels_of(path, BLUE) > 10 * count
    assert (pixels_of(path, ORANGE) > 1000) is moved


@pytest.mark.parametrize("labels", [("complaint", "no complaint"), ("a" * 200, "b"), (r"$\foo$", "$5 $6")])
def test_a_confusion_has_room_for_any_labels(tmp_path, labels):
    path = tmp_path / "confusion.png"
    draw_confusion([[99, 1], [1, 99]], labels, path, title="Accuracy 99.0%, macro-F1 0.990")
    image = imread(path)[..., :3]
    for edge in (image[:3], image[-3:], image[:, :3], image[:, -3:]):
        assert (edge == 1).all()  # nothing is cut off
    assert 300 < image.shape[0] < 2000
    assert 300 < image.shape[1] < 2000
