"""The code blocks of the README and of docs/ run, page by page; the shipped model stands in for hub names."""

import re
from pathlib import Path

import pytest
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from softprompt.tiny import model_path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run as typed, with its commands, by tests/cli/test_docs.py.
TYPED = "quickstart.md"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `softprompt-output` in it, as `softprompt train` leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    base = AutoModelForCausalLM.from_pretrained(model_path())
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    get_peft_model(base, config).save_pretrained(folder / "softprompt-output")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != TYPED], ids=lambda page: page.name)
def test_the_code_blocks_of_a_page_run(page, trained, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(trained)
    namespace = {"__name__": "page"}
    for block in blocks:
        code = block.replace('"bigscience/bloomz-560m"', repr(str(model_path())))
        exec(compile(code, str(page), "exec"), namespace)


def test_the_readme_names_every_module_of_the_package_and_of_its_engine():
    tree = (ROOT / "README.md").read_text().split("## Architecture")[1].split("\n## ")[0]
    named = set(re.findall(r"\b\w+\.py\b", tree))
    package = ROOT / "softprompt"
    modules = {path.name for folder in (package, package / "engine") for path in folder.glob("[!_]*.py")}
    assert modules <= named


def test_the_page_on_installing_names_every_native_op():
    page = (ROOT / "docs" / "install.md").read_text()
    ops = {path.parent.name for path in (ROOT / "softprompt" / "ops").glob("*/native.py")}
    on_a_gpu = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {op for op in ops if f"`{op}`" in page} == ops
    assert "cross_entropy" in on_a_gpu
    assert "attention" not in on_a_gpu  # the page says for the CPU alone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
