"""Runs the tests of all architectures and writes docs/models.md from their records (`make docs`)."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HEAD = """# Models

What softprompt does with an architecture, and how far loss, logits and the gradient of the prompt are off
from plain PEFT in the worst of six batches: pads on the left and on the right, labels on the answer, on all
tokens and on the first token. The models are tiny, with random weights, in fp32; errors are relative to the
norm of what is expected. "compact" compares `positions="compact"` on padded batches with each row alone.

Written by `make docs` from the records of `tests/models`: {versions}.

| architecture | class | route | attention | largest error | compact |
|---|---|---|---|---|---|
"""


def page(lines: list[dict]) -> str:
    """The Markdown page of the records, packed models first."""
    rows: dict[str, dict] = {}
    for line in lines:
        rows.setdefault(line["name"], {}).update(line)
    order = {"packed": 0, "padded": 1, "stock": 2}
    ordered = sorted(rows.values(), key=lambda row: (order[row["route"]], row["name"]))
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    text = HEAD.format(versions=versions) + "".join(_row(row) for row in ordered)
    reasons = "".join(f"- {row['name']}: {row['reason']}.\n" for row in ordered if row["route"] != "packed")
    count = sum(row["route"] == "packed" for row in ordered)
    return f"{text}\n{count} architectures take the packed route. Why the others do not:\n\n{reasons}"


def _row(row: dict) -> str:
    errors = [f"{row[key]:.0e}" if row.get(key) is not None else "-" for key in ("padded", "compact")]
    return f"| {row['name']} | {row['model']} | {row['route']} | {row['seam']} | {' | '.join(errors)} |\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "models.jsonl"
        environment = {**os.environ, "SOFTPROMPT_RECORD_MODELS": str(record)}
        tests = [sys.executable, "-m", "pytest", "-q", "-n", "2", str(Path(__file__).parent)]
        subprocess.run(tests, check=True, env=environment)
        found = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    target = Path(__file__).parents[2] / "docs" / "models.md"
    target.write_text(page(found), encoding="utf-8")
