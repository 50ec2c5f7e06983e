"""The records under docs/ablations are those of the commands that the page gives."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from softprompt.cli import build_parser
from softprompt.cli.options import read_options, values_of
from softprompt.cli.sweep_config import parse_over
from softprompt.cli.training_config import TrainingConfig
from softprompt.tasks.sweep import summary_of

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "ablations.md").read_text(encoding="utf-8")
NAMES = ["length", "initialiser", "learning-rate"]


@pytest.fixture(params=NAMES)
def record(request):
    folder = DOCS / "ablations" / request.param
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8")) | {"folder": folder}


def command_of(name):
    blocks = re.findall(r"```bash\n(softprompt sweep.*?)```", PAGE, flags=re.DOTALL)
    (line,) = [block for block in blocks if f"--output ablations/{name}\n" in block]
    words = shlex.split(line.replace("\\\n", " "))[1:]
    parsed = build_parser().parse_args(words)
    parsed.argv = words
    return parsed


def test_a_record_has_the_runs_that_its_command_makes(record):
    args = command_of(record["folder"].name)
    over = parse_over(args.over)
    assert record["over"] == list(over)
    assert record["seeds"] == list(range(args.seed, args.seed + args.seeds))
    for field, values in over.items():
        assert list(dict.fromkeys(row[field] for row in record["runs"])) == values
    expected = len(record["seeds"])
    for values in over.values():
        expected *= len(values)
    assert len(record["runs"]) == expected
    config = read_options(TrainingConfig, args).with_recipe().for_task("classify")
    config = values_of(config.resolved(rows=200, scale=1.0, dtype="float32"))
    for name, value in record["fixed"].items():
        assert config[name] == value


def test_a_record_names_nothing_but_the_shipped_model_and_table(record):
    assert (record["model"], record["data"]) == ("the shipped tiny model", "the shipped table")
    assert not re.search(r'"/|\\\\|tmp', (record["folder"] / "sweep.json").read_text(encoding="utf-8"))


def test_the_table_and_the_means_of_a_record_are_those_of_its_runs(record):
    frame = pd.read_csv(record["folder"] / "sweep.csv")
    pd.testing.assert_frame_equal(frame, pd.DataFrame(record["runs"]), check_dtype=False)
    again = summary_of(record["runs"], record["over"])
    assert json.loads(json.dumps(again)) == record["settings"]
    assert (record["folder"] / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_settings_of_the_length_record_learn_as_the_page_says():
    settings = json.loads((DOCS / "ablations" / "length" / "sweep.json").read_text())["settings"]
    losses = {(s["init"], s["num_virtual_tokens"]): s["eval_loss"]["mean"] for s in settings}
    for init, enough in (("random", 8), ("vocab", 2)):
        for length in (1, 2, 4, 8, 16, 32):
            assert (losses[init, length] < 0.1) is (length >= enough)


@pytest.mark.slow
def test_a_run_of_a_record_can_be_made_again(run, tmp_path, monkeypatch):
    options = ("--num-virtual-tokens", 8, "--steps", 10, "--seeds", 1, "--output", tmp_path / "out")
    assert run("sweep", "--over", "init", "matched", *options)[0] == 0
    record = json.loads((DOCS / "ablations" / "initialiser" / "sweep.json").read_text())
    (made,) = json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"]
    (kept,) = [row for row in record["runs"] if (row["init"], row["seed"]) == (made["init"], made["seed"])]
    # Rounding differs between processors.
    assert made["eval_loss"] == pytest.approx(kept["eval_loss"], rel=0.05)
