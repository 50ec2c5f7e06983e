"""Records of the table in docs/models.md, where SOFTPROMPT_RECORD_MODELS names a file."""

import json
import os

import pytest


@pytest.fixture
def record():
    """Appends a line to the record; processes of a parallel run share the file."""
    path = os.environ.get("SOFTPROMPT_RECORD_MODELS")

    def write(**values):
        if path:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    return write
