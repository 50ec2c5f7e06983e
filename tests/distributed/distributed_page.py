"""The scripts of docs/distributed.md."""

import os
import re
from pathlib import Path

from softprompt.tiny import model_path

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def run(language, folder):
    """The variables of the only script in a language, after it was run in a folder."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    os.chdir(folder)
    namespace = {"__name__": "page"}
    code = block.replace('"bigscience/bloomz-560m"', repr(str(model_path())))
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace
