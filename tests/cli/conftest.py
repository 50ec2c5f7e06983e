"""A random-weights BLOOM with its own tokenizer, and small tables, made where the tests run."""

import contextlib
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedTokenizerFast,
)

from softprompt.tasks import plot

SAVE_FIGURE = plot.save_figure
GOOD = ("thanks for the quick help", "lovely day at the lake", "my new phone is here", "see you at the game")
BAD = ("my order never came", "the app crashes again", "no answer from support", "this flight is late again")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bloom"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        *GOOD,
        *BAD,
        "Tweet text : Label : complaint no complaint",
        "Classify if the tweet is a complaint or not:",
    ]
    tokenizer.train_from_iterator(
        texts * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(fast),
        hidden_size=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    BloomForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def unpacked_folder(model_folder, tmp_path_factory):
    """A model with convolutions, whose state would cross from row to row, so that it cannot be packed."""
    folder = tmp_path_factory.mktemp("models") / "lfm2"
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    Lfm2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_tweets():
    """Write a table of 20 rows, 12 complaints and 8 others, into a folder."""

    def make(folder):
        rows = [(f"{BAD[i % 4]} {i}", "complaint") for i in range(12)]
        rows += [(f"{GOOD[i % 4]} {i}", "no complaint") for i in range(8)]
        return write_csv(folder / "tweets.csv", rows)

    return make


@pytest.fixture
def table(make_tweets, tmp_path):
    return make_tweets(tmp_path)


def write_csv(path, rows, header=("Tweet text", "Label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def make_table(tmp_path):
    def make(rows, name="made.csv", header=("Tweet text", "Label")):
        return write_csv(tmp_path / name, rows, header)

    return make


@pytest.fixture(autouse=True)
def without_fast_bf16(monkeypatch):
    """`--dtype auto` is float32, whatever the processor."""
    monkeypatch.setattr("softprompt.cli.models.has_fast_bf16", lambda device: False)


@pytest.fixture(scope="module", autouse=True)
def without_rendering():
    """Figures are drawn, and empty files: rendering takes longer than training a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "save_figure", lambda figure, path, whole=False: Path(path).write_bytes(b""))
        yield


@pytest.fixture
def rendered(monkeypatch):
    """Figures are what they are without tests."""
    monkeypatch.setattr(plot, "save_figure", SAVE_FIGURE)


@pytest.fixture
def run(capsys):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""
    from softprompt.cli import main

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def read_json():
    return lambda path: json.loads(path.read_text(encoding="utf-8"))


HOLDER = """
import sys, time
from pathlib import Path
from softprompt.tasks.folders import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held_by_another():
    """A block in which another process writes to a folder, and at whose end it is killed."""

    @contextlib.contextmanager
    def block(folder):
        arguments = [sys.executable, "-c", HOLDER, str(folder)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
            try:
                assert holder.stdout.readline() == "held\n"
                yield
            finally:
                holder.kill()

    return block
