"""A run that is killed with SIGKILL in a save goes on from its last whole checkpoint as if nothing had been.

Some kills; kill_saves.py makes the committed record.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(seconds=35)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("kills") / "record.json"
    script = HERE / "kill_saves.py"
    command = [sys.executable, script, "--kills", "5", "--torn", "2", "--seed", "1", "--record", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], timeout=300)
    assert path.exists(), done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("how", ["kills", "torn"])
def test_every_killed_run_ends_as_if_nobody_had_killed_it(record, how):
    problems = [moment for moment in record["moments"] if moment["problem"]]
    assert not problems
    count = record[how]
    assert count["died"] == count["resumed"] == count["equal"] == count["runs"] > 0


def test_the_record_of_all_kills_has_fifty_of_fifty():
    committed = json.loads((HERE / "kill_saves.json").read_text(encoding="utf-8"))
    count = committed["kills"]
    assert count["died"] == count["resumed"] == count["equal"] == count["runs"] >= 50
