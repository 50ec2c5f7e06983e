"""Bad input to the commands, with the whole message; what one command alone refuses is in its own file."""

import pytest

TABLE = "Tweet text,Label\nhello,complaint\nbye,no complaint\n"

# name -> (arguments, message); {tmp} is the folder of the test
CASES = {
    "train without a table": (
        ["train", "--model", "{model}", "--data", "{tmp}/none.csv", "--output", "{tmp}/out"],
        "{tmp}/none.csv does not exist: check the path of the table",
    ),
    "predict without an adapter": (
        ["predict", "--adapter", "{tmp}/none", "--data", "{tmp}/table.csv", "--output", "{tmp}/p.csv"],
        "--adapter {tmp}/none holds no adapter: give a folder that `softprompt train` wrote",
    ),
    "inspect without an adapter": (
        ["inspect", "--adapter", "{tmp}/none", "--output", "{tmp}/out"],
        "--adapter: {tmp}/none does not exist: give a .npy file or an adapter folder",
    ),
    "export without an adapter": (
        ["export", "--adapter", "{tmp}/none", "--format", "npy", "--output", "{tmp}/p.npy"],
        "--adapter: {tmp}/none does not exist: give a .npy file or an adapter folder",
    ),
    "export of an empty folder": (
        ["export", "--adapter", "{tmp}/empty", "--format", "npy", "--output", "{tmp}/p.npy"],
        "--adapter: {tmp}/empty holds no adapter: expected a folder with adapter_config.json",
    ),
    "train on an empty table": (
        ["train", "--model", "{model}", "--data", "{tmp}/empty.csv", "--output", "{tmp}/out"],
        "{tmp}/empty.csv has no rows: give a table with at least one",
    ),
    "train on a table without rows": (
        ["train", "--model", "{model}", "--data", "{tmp}/header.csv", "--output", "{tmp}/out"],
        "{tmp}/header.csv has no rows: give a table with at least one",
    ),
    "train on another column": (
        [
            "train",
            "--model",
            "{model}",
            "--data",
            "{tmp}/table.csv",
            "--text-column",
            "text",
            "--output",
            "{tmp}/out",
        ],
        "{tmp}/table.csv has no column 'text'; its columns are 'Tweet text', 'Label': name one "
        "of them as the text column",
    ),
    "train without a model": (
        [
            "train",
            "--model",
            "{tmp}/empty",
            "--eval-share",
            "0",
            "--data",
            "{tmp}/table.csv",
            "--output",
            "{tmp}/out",
        ],
        "the model folder {tmp}/empty has no config.json: give a folder saved by save_pretrained",
    ),
    "train over a file": (
        ["train", "--model", "{model}", "--data", "{tmp}/table.csv", "--output", "{tmp}/table.csv"],
        "--output {tmp}/table.csv is a file: name a folder",
    ),
    "sweep without a table": (
        [
            "sweep",
            "--over",
            "learning-rate",
            "1",
            "2",
            "--model",
            "{model}",
            "--data",
            "{tmp}/none.csv",
            "--output",
            "{tmp}/out",
        ],
        "{tmp}/none.csv does not exist: check the path of the table",
    ),
    "predict into a folder": (
        [
            "predict",
            "--adapter",
            "{tmp}/adapter",
            "--data",
            "{tmp}/table.csv",
            "--output",
            "{tmp}/empty",
            "--overwrite",
        ],
        "--output {tmp}/empty is a folder: name a file",
    ),
    "a demo of no steps": (
        ["demo", "--steps", "0", "--output", "{tmp}/out"],
        "argument --steps: must be at least 10, got 0 (see softprompt demo --help)",
    ),
}


@pytest.mark.parametrize("arguments, message", CASES.values(), ids=CASES)
def test_bad_input_is_one_line_with_the_remedy(run, model_folder, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text(TABLE.splitlines()[0] + "\n")
    (tmp_path / "table.csv").write_text(TABLE)
    before = sorted(path.name for path in tmp_path.iterdir())
    places = {"tmp": tmp_path, "model": model_folder}
    code, out, err = run(*(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "")
    assert err == f"softprompt: {message.format(**places)}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
