import re
import shlex
from pathlib import Path

import pytest

from softprompt.cli import COMMANDS, build_parser

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
    parsed = build_parser().parse_args(shlex.split(line)[1:])
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
    assert len(given) == 6
    for option, value in given:
        assert defaults[option.replace("-", "_")] == float(value)


def test_the_example_of_every_help_is_a_command_of_the_program():
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action.choices, dict))
    for command in commands.choices.values():
        line = command.epilog.split("\n  ", 1)[1].replace("\\\n", " ")
        assert parser.parse_args(shlex.split(line)[1:]).run is command.get_default("run")
