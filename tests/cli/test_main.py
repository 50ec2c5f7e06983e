import json
import logging
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from softprompt import __version__
from softprompt.cli import build_parser, checks, main
from softprompt.tasks.classification import TextTask


def test_help_does_not_import_torch():
    code = "import sys; from softprompt.cli import main\n"
    code += "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'datasets'} & set(sys.modules)\n"
    code += "print('HEAVY', sorted(heavy))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.endswith("HEAVY []\n")


def test_the_module_runs_the_command_line():
    finished = subprocess.run(
        [sys.executable, "-m", "softprompt", "predict", "--adapter", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr == (
        "softprompt: the following arguments are required: --data, --output (see softprompt predict --help)\n"
    )


def test_the_version_needs_no_command(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"softprompt {version('softprompt')}\n" == f"softprompt {__version__}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("train --modle x", "unrecognized arguments: --modle x; did you mean --model? (see softprompt train"),
        ("train --modle=x", "unrecognized arguments: --modle=x; did you mean --model? (see softprompt train"),
        ("train --model x --zzz", "unrecognized arguments: --zzz (see softprompt train --help)"),
        ("train x.csv", "unrecognized arguments: x.csv (see softprompt train --help)"),
        (
            "predict --adaptor a --data d --ouput o",
            "the following arguments are required: --adapter, --output; did you mean --adapter and --output? "
            "(see softprompt predict --help)",
        ),
        (
            "inspect --adapter a --neighbors 3",
            "unrecognized arguments: --neighbors 3; did you mean --ne",
        ),
        (
            "sweep --over epochs 1 2 --seed 1 --outptu o",
            "unrecognized arguments: --outptu o; did you mean",
        ),
        (
            "doctor --requires native",
            "unrecognized arguments: --requires native; did you mean --requ",
        ),
        (
            "train --epochs two --model x",
            "argument --epochs: expected a whole number, got 'two' (s",
        ),
        ("--verison", "the following arguments are required: COMMAND (see softprompt --help)"),
        ("tune --modle x", "argument COMMAND: invalid choice: 'tune'"),
    ],
)
def test_an_unknown_option_is_an_error_of_its_command(run, arguments, message):
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"softprompt: {message}")


# command and what it is given, with a path that leads nowhere -> what is said of it
NOWHERE = {
    "train --data none.csv": "none.csv does not exist: check the path of the table",
    "train --data ./none": "./none does not exist: check the path of the table",
    "train --data rows.txt": "rows.txt is of the unknown type '.txt': give one of .csv, .tsv, .jsonl, .json",
    "train --data rows.csv --eval-data none.jsonl": "none.jsonl does not exist: check the path of the table",
    "train --data rows.csv --model ./none": "the model ./none is not a folder",
    "train --data rows.csv --model empty": "the model folder empty has no config.json",
    "train --init saved --init-from none.npy": "--init saved: none.npy does not exist: give a .npy file",
    "train --init saved --init-from empty": "--init saved: empty holds no adapter: expected a folder with ",
    "train --init saved --init-from half": "--init saved: half has no weights: expected adapter_model.safe",
    "train --resume": "--resume: softprompt-output has no complete checkpoint",
    "sweep --over epochs 1 2 --data none.csv": "none.csv does not exist: check the path of the table",
    "sweep --over epochs 1 2 --model ./none": "the model ./none is not a folder",
    "sweep --over init vocab saved --init-from none": "--init saved: none does not exist: give a .npy file",
    "predict --adapter none --data rows.csv --output o.csv": "--adapter none holds no adapter",
    "predict --adapter half --data rows.csv --output o.csv": "half has no weights: expected adapter_model.s",
    "predict --adapter whole --data none.csv --output o.csv": "none.csv does not exist: check the path of ",
    "predict --adapter whole --data rows.csv --output o.csv --model ./none": "the model ./none is not a fol",
    "predict --adapter whole --data rows.csv --output o.csv": "the model /nowhere/bloom is not a folder",
    "predict --adapter half/full --data rows.csv --output o.csv": "half/full has no softprompt.json: give a ",
    "inspect --adapter whole": "the model /nowhere/bloom is not a folder",
    "inspect --adapter none": "--adapter: none does not exist: give a .npy file or an adapter folder",
    "inspect --adapter several": "--adapter: several holds an ensemble of 2 prompts: name one of them",
    "inspect --adapter whole --initial none.npy": "--initial: none.npy does not exist: give a .npy file",
    "inspect --adapter whole --model ./none": "the model ./none is not a folder",
    "export --adapter none.npy --format npy --output o.npy": "--adapter: none.npy does not exist: give a ",
    "export --adapter empty --format peft --output o": "--adapter: empty holds no adapter: expected a fold",
    "export --adapter whole --format peft --output o --model ./none": "the model ./none is not a folder",
}

# Each call, in one process that imports nothing for them.
SAYS_WHAT_IS_MISSING = """
import contextlib, io, json, sys
from softprompt.cli import main
for line in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(line.split())
    heavy = sorted({"torch", "transformers", "pandas", "matplotlib", "datasets"} & set(sys.modules))
    print(json.dumps([line, code, said.getvalue(), heavy]))
"""


@pytest.fixture(scope="module")
def said_of_nowhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nowhere")
    for name in ("empty", "half", "whole", "several", "several/prompt-1", "several/prompt-2"):
        (folder / name).mkdir()
    for name in ("half", "whole", "several/prompt-1", "several/prompt-2"):
        (folder / name / "adapter_config.json").write_text("{}")
    shutil.copytree(folder / "half", folder / "half" / "full")
    for name in ("whole", "half/full"):
        (folder / name / "adapter_model.safetensors").write_bytes(b"")
    task = TextTask("Tweet text", "Label", ("complaint", "no complaint"))
    task.save(folder / "whole", model="/nowhere/bloom", training={})
    for name in ("rows.csv", "rows.txt"):
        (folder / name).write_text("Tweet text,Label\nhello,complaint\nbye,no complaint\n")
    finished = subprocess.run(
        [sys.executable, "-c", SAYS_WHAT_IS_MISSING, json.dumps(list(NOWHERE))],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return {line: rest for line, *rest in map(json.loads, finished.stdout.splitlines())}


@pytest.mark.parametrize("line", NOWHERE)
def test_what_is_not_there_is_said_before_anything_is_imported(said_of_nowhere, line):
    code, said, heavy = said_of_nowhere[line]
    assert code == 2
    assert said.startswith(f"softprompt: {NOWHERE[line]}")
    assert said.count("\n") == 1
    assert heavy == []


@pytest.mark.parametrize("command", ["train", "predict", "demo", "doctor"])
def test_the_help_of_a_command_explains_every_option_and_ends_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as leaving:
        build_parser().parse_args([command, "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  softprompt {command} --" in text
    commands = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    for action in commands.choices[command]._actions:
        assert action.help
        assert len(action.help) > 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: COMMAND (see softprompt --help)"),
        (["tune"], "argument COMMAND: invalid choice: 'tune'"),
        (["train", "--num-virtual-tokens", "0"], "argument --num-virtual-tokens: must be at least 1, got 0"),
        (["train", "--seed", "4294967296"], "argument --seed: must be at most 2147483647, got 4294967296"),
        (["train", "--model", ""], "argument --model: must not be empty"),
        (["train", "--data", " "], "argument --data: must not be empty"),
        (["export", "--format", "peft", "--adapter", "a", "--output", ""], "argument --output: must not be"),
        (["train", "--template", "\udc80 {text}"], "argument --template: must be valid UTF-8, got '\\udc80"),
        (["train", "--epochs", "two"], "argument --epochs: expected a whole number, got 'two'"),
        (["train", "--learning-rate", "0"], "argument --learning-rate: must be more than 0, got 0"),
        (["train", "--learning-rate", "nan"], "argument --learning-rate: must be more than 0, got nan"),
        (["train", "--eval-share", "1"], "argument --eval-share: must be at least 0 and less than 1, got 1"),
        (["train", "--bf16", "--fp16"], "argument --fp16: not allowed with argument --bf16"),
        (["train", "--overwrite", "--resume"], "argument --resume: not allowed with argument --overwrite"),
        (["train", "--init", "words"], "argument --init: invalid choice: 'words'"),
        (
            ["train", "--init-text", " "],
            "--init text needs words to start from: give --init-text, or --init answers",
        ),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith(f"softprompt: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name in ("rich", "datasets") else object())
    code, _, err = run("train")
    assert code == 2
    assert err == (
        "softprompt: datasets, rich is not installed: run pip install '.[cli]' in the folder of softprompt's "
        "sources\n"
    )


def test_that_plain_peft_writes_labels_without_a_cache_is_said_once(monkeypatch, capsys):
    from softprompt.cli import models

    models._say_once.cache_clear()
    model = torch.nn.Identity()
    assert models.patch(model, no_patch=True) is model
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(models, "right_options", lambda model: {"use_cache": False})
    for _ in range(2):
        assert models.patch(model, no_patch=True) is model
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "softprompt: --no-patch: PEFT" in said
    assert "labels are written without a cache, which is slower" in said


def test_ctrl_c_outside_training_is_exit_code_130(run, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("softprompt.cli.demo.run", interrupted)
    assert run("demo") == (130, "", "softprompt: interrupted\n")


def test_what_torchao_says_of_its_libraries_stays_out_of_the_output(capsys):
    main(["doctor"])
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).warning("Failed to load a library")
    assert "Failed to load" not in capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError, which is known by its name."""


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(30, "Read-only file system", "out/p.csv"), "out/p.csv: Read-only file system"),
        (MemoryError(), checks.OUT_OF_MEMORY),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), checks.OUT_OF_MEMORY),
        (
            OSError("1024 requested and 224 written"),
            "a file could not be written, is the disk full? (1024 requested and 224 written)",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8512 vs 8406"),
            "a file could not be written, is the disk full? ([enforce fail at inline_container.cc:672] . "
            "unexpected pos 8512 vs 8406)",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), checks.OUT_OF_MEMORY),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(run, monkeypatch, error, message):
    def fail(args):
        raise error

    monkeypatch.setattr("softprompt.cli.doctor.run", fail)
    code, _, err = run("doctor")
    assert (code, err) == (2, f"softprompt: {message}\n")


def test_a_fault_of_the_program_keeps_its_traceback(run, monkeypatch):
    def fail(args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("softprompt.cli.doctor.run", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("doctor")
