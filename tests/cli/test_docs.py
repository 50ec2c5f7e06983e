import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from gguf_files import write_gguf
from marks import slow_unless

from softprompt.cli import COMMANDS, build_parser, gguf, main
from softprompt.tiny import eval_table

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "train.md"
PAGES = [
    PAGE,
    *(
        DOCS / f"{name}.md"
        for name in ("initialise", "inspect", "export", "score", "ensemble", "ablations", "quickstart")
    ),
]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
]
LINES = [
    line
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("softprompt")
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_page_is_a_command_of_the_program(line):
    parsed = build_parser().parse_args(shlex.split(line, comments=True)[1:])
    assert parsed.run in [command.run for command in COMMANDS]


# An option of vLLM.
FOREIGN = {"--enable-prompt-embeds"}


@pytest.mark.parametrize(
    "page, fewest",
    list(zip(PAGES, (21, 3, 3, 4, 4, 6, 10, 4), strict=True)),
    ids=lambda value: str(value)[-8:],
)
def test_the_options_that_a_page_names_exist(capsys, page, fewest):
    for command in ("train", "sweep", "predict", "inspect", "export", "demo"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
    shown = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z][a-z0-9-]*", page.read_text(encoding="utf-8"))) - FOREIGN
    assert len(named) >= fewest
    assert named <= shown


def test_the_defaults_that_the_page_gives_are_those_of_the_program():
    defaults = vars(build_parser().parse_args(["train"]))
    given = re.findall(r"`--([a-z-]+)` \(([\d.]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(given) == 3
    for option, value in given:
        assert defaults[option.replace("-", "_")] == float(value)


def test_the_example_of_every_help_is_a_command_of_the_program():
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action.choices, dict))
    for command in commands.choices.values():
        line = command.epilog.split("\n  ", 1)[1].replace("\\\n", " ")
        assert parser.parse_args(shlex.split(line)[1:]).run is command.get_default("run")


README = DOCS.parent / "README.md"
HUB = "bigscience/bloomz-560m"
TWEETS = [
    ("my order never came", "complaint", "send it"),
    ("lovely day at the lake", "no complaint", "sun"),
] * 8
# page -> the tables of the reader's own that it speaks of, with their columns, and whether it begins with a
# trained prompt. The sweeps of the ablations take minutes.
READERS = {
    README: ({"train.csv": ("Tweet text", "Label"), "new.csv": ("Tweet text",)}, False),
    DOCS / "train.md": (
        {
            "tweets.csv": ("text", "label"),
            "new_tweets.csv": ("text",),
            "new_tweets.jsonl": ("text",),
            "train.csv": ("Tweet text", "Label"),
            "pairs.csv": ("premise", "label", "hypothesis"),
            "questions.csv": ("question", "answer"),
        },
        False,
    ),
    DOCS / "ensemble.md": ({"tweets.csv": ("Tweet text",)}, False),
    DOCS / "initialise.md": ({}, False),
    DOCS / "score.md": ({"tweets.csv": ("Tweet text", "Label")}, True),
    DOCS / "inspect.md": ({}, True),
    DOCS / "export.md": ({}, True),
}


def typed(page):
    """The calls of softprompt on a page, in their order: in blocks, and in lines of four spaces."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:    )?softprompt [a-z].*$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "softprompt-output"
    assert main(["train", "--epochs", "1", "--eval-share", "0", "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    "page",
    slow_unless(lambda page: page.name not in ("ensemble.md", "train.md", "initialise.md"), READERS),
    ids=lambda page: page.name,
)
def test_the_commands_of_a_page_run_as_typed(run, trained_folder, model_folder, tmp_path, monkeypatch, page):
    tables, begins_trained = READERS[page]
    for name, columns in tables.items():
        frame = pd.DataFrame([row[: len(columns)] for row in TWEETS], columns=columns)
        if name.endswith(".csv"):
            frame.to_csv(tmp_path / name, index=False)
        else:
            frame.to_json(tmp_path / name, orient="records", lines=True)
    if begins_trained:
        shutil.copytree(trained_folder, tmp_path / "softprompt-output")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(gguf.CACHE_VARIABLE, str(tmp_path / "cache"))
    calls = typed(page)
    for name in {word for call in calls for word in call if word.endswith(".gguf")}:
        write_gguf(tmp_path / name)
    assert calls
    for call in calls:
        few = {"train": ["--epochs", "1"], "demo": ["--steps", "10"]}.get(call[0], [])
        code, _, error = run(*[str(model_folder) if word == HUB else word for word in call], *few)
        assert (code, error if code else "") == (0, ""), call


@pytest.mark.slow(seconds=45)
def test_the_quickstart_runs_as_typed(tmp_path):
    page = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    python, shell = (
        "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE))
        for language in ("python", "bash")
    )
    assert "save_pretrained" in python
    assert shell.count("softprompt ") == 2
    command = tmp_path / "bin" / "softprompt"  # as pip installs it, of the package that is tested here
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m softprompt "$@"\n')
    command.chmod(0o755)
    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "page.py").write_text(python, encoding="utf-8")
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    for typed_in in ([sys.executable, "page.py"], ["bash", "-e", "-c", shell]):
        finished = subprocess.run(
            typed_in,
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
    assert (folder / "complaints" / "adapter_config.json").is_file()
    assert (folder / "by-command" / "metrics.json").is_file()
    labelled = pd.read_csv(folder / "labelled.csv")
    rows = pd.read_csv(eval_table())
    assert list(labelled.columns) == ["Tweet text", "prediction"]
    assert list(labelled["Tweet text"]) == list(rows["Tweet text"])
    assert (labelled["prediction"] == rows["Label"]).mean() > 0.9
