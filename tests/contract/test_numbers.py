"""The contract has 25 statements, and each has a test that carries its number."""

import re
from pathlib import Path

STATEMENTS = range(1, 26)
NUMBERED = re.compile(r"^def test_(\d\d)_", re.MULTILINE)


def test_every_statement_has_a_test():
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    numbers = {int(number) for file in files for number in NUMBERED.findall(file.read_text())}
    assert sorted(numbers) == [*STATEMENTS]
