"""Records of the long runs, as JSON."""

import json
import platform
from importlib.metadata import version

PACKAGES = ("softprompt", "torch", "transformers", "peft", "hypothesis")


def write_record(path, content):
    """Writes a record with the versions that it was made with."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"versions": versions}, indent=2) + "\n", encoding="utf-8")
