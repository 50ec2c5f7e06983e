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


def test_what_the_architecture_names_is_there():
    tree = (ROOT / "README.md").read_text().split("## Architecture")[1].split("\n## ")[0]
    named = set(re.findall(r"\b\w+\.py\b", tree))
    package = ROOT / "softprompt"
    assert len(named) > 15
    assert named <= {path.name for folder in (package, package / "engine") for path in folder.glob("*.py")}
    assert set(re.findall(r"`(softprompt/[^`]+)`", tree)) <= {
        path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")
    }


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:softprompt|tests|benchmarks|csrc|docs)/[\w./*-]+)`", page.read_text())
    assert [name for name in named if not any(ROOT.glob(name.rstrip("/")))] == []


def test_the_drawing_is_that_of_its_script_and_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "drawings")
    import how_it_works

    assert how_it_works.TARGET.read_text() == how_it_works.draw()
    for step in (*how_it_works.WAY, *(beside for beside, _ in how_it_works.BESIDE)):
        source = (ROOT / "softprompt" / step.file).read_text()
        for name in re.findall(r"\b[a-z]+_[a-z_]+\b|\b[A-Z]\w+\.\w+\b", step.title):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), (step.title, step.file)


def test_the_page_on_installing_names_every_native_op():
    page = (ROOT / "docs" / "install.md").read_text()
    sources = (ROOT / "softprompt" / "ops").rglob("*.py")
    ops = {name for path in sources for name in re.findall(r'Backends\(\s*"(\w+)"', path.read_text())}
    assert len(ops) == 8
    assert {op for op in ops if f"`{op}`" in page} == ops
    on_a_gpu = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert "cross_entropy" in on_a_gpu
    assert not {"attention", "elementwise"} & on_a_gpu  # the page says for the CPU alone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
