"""A tiny BLOOM and a small table of tweets that travel with the package, so that every example runs offline.

Model, tokenizer and tweets are synthetic: this project generated the text from word banks and pretrained
the model on it (benchmarks/tiny_model in the sources). Nobody wrote these tweets, and no figure obtained with
them says anything about quality on real tweets; they are there to show and to test that prompt tuning works.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["eval_table", "model_path", "train_table"]

_FOLDER = Path(__file__).parent


def model_path() -> str:
    """Folder of the tiny BLOOM and its tokenizer, for `from_pretrained(..., dtype=torch.float32)`.

    A string, as the name of any model is: PEFT writes it into the configuration of an adapter, which is JSON.
    """
    return str(_FOLDER / "model")


def train_table() -> Path:
    """CSV of 200 generated tweets to tune a prompt on, half of them complaints: `Tweet text`, `Label`."""
    return _FOLDER / "tweets.csv"


def eval_table() -> Path:
    """CSV of 200 other generated tweets to evaluate on, half of them complaints: `Tweet text`, `Label`."""
    return _FOLDER / "tweets_eval.csv"
