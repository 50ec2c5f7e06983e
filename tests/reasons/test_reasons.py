"""Every reason for not taking the fast route is said once, is read with `explain`, and has a test."""

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest
from architectures import ARCHITECTURES
from messages import warned
from tiny_models import prompted

import softprompt
from reasons import DIRECT, ELSEWHERE, ROWS, pattern_of
from softprompt.engine import cuda_graph
from softprompt.engine.cuda_graph import RerunRecorder

ROOT = Path(softprompt.__file__).parent
TESTS = Path(__file__).parents[1]


class Kit:
    """What the rows need of pytest."""

    architectures = ARCHITECTURES

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def llama(self):
        return prompted("llama")

    def record(self, error=None):
        """Lets steps on the CPU be recorded, or fail in the middle of that."""

        class Recorder(RerunRecorder):
            def record(self, run, device):
                run()
                if error is not None:
                    raise error
                return run

        self.monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", Recorder())


def rows_that(said):
    rows = [row for row in ROWS if row.said == said]
    return pytest.mark.parametrize("row", rows, ids=[row.id for row in rows])


@rows_that("warning")
def test_a_reason_is_one_warning_and_is_read_with_explain(row, monkeypatch):
    model, messages = warned(lambda: row.make(Kit(monkeypatch)))
    assert len([message for message in messages if re.search(row.pattern, message)]) == 1, messages
    report = softprompt.explain(model)
    assert re.search(row.pattern, str(report)), report


@rows_that("explain")
def test_a_reason_that_needs_no_warning_is_read_with_explain(row, monkeypatch):
    model, _ = warned(lambda: row.make(Kit(monkeypatch)))
    report = softprompt.explain(model)
    assert re.search(row.pattern, str(report)), report


@rows_that("error")
def test_a_reason_where_nothing_else_is_right_is_an_error(row, monkeypatch):
    with pytest.raises((RuntimeError, softprompt.UnsupportedModelError)) as error:
        warned(lambda: row.make(Kit(monkeypatch)))
    assert re.search(row.pattern, str(error.value)), error.value


@pytest.mark.parametrize("sentence", DIRECT)
def test_a_reason_of_other_machines_is_given_by_its_function(sentence, monkeypatch):
    assert re.search(pattern_of(sentence), DIRECT[sentence](Kit(monkeypatch)))


# --------------------------------------------------------------------------------------------- completeness
_MAKERS = {
    "Plan",
    "Prefill",
    "_Answers",
    "Availability",
    "AttributeError",
    "RecordingError",
    "UnsupportedAttentionError",
    "UnsupportedModelError",
    "ReferenceFailedError",
    "_refuse",
}
_NAMES = {"reason", "head_reason", "obstacle"}
_LISTS = {"reasons", "rejected"}


def sources():
    """The modules that decide on routes; the command line and the kernels name their errors themselves."""
    yield from (path for path in ROOT.glob("*.py") if path.name != "__init__.py")
    for folder in ("engine", "generation"):
        yield from (ROOT / folder).glob("*.py")
    yield ROOT / "ops" / "registry.py"


def sentences_in(path):
    """The sentences that functions of a file give as reasons, with {} for values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for part in _reasons_of(node):
            yield from (
                text for text in _texts(part) if len(re.findall(r"[A-Za-z]+", text)) > 1 and " " in text
            )


def _reasons_of(node):
    if isinstance(node, ast.FunctionDef) and node.returns and "str | None" in ast.unparse(node.returns):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return) and inner.value is not None:
                yield inner.value
    elif isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if name in _MAKERS or (name == "append" and owner in _LISTS):
            usable = name == "Availability" and isinstance(node.args[0], ast.Constant) and node.args[0].value
            yield from [] if usable else node.args
    elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(getattr(target, "id", "") in _NAMES for target in targets):
            yield node.value


@functools.cache
def _constants():
    """The sentences that modules of the engine and the patch have under a name."""
    found = {}
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.parent.name != "ops" else ():
            if isinstance(node, ast.Assign) and isinstance(getattr(node.value, "value", None), str):
                found |= {target.id: node.value.value for target in node.targets}
    return found


def _named(node):
    return _constants().get(getattr(node, "id", getattr(node, "attr", "")))


def _texts(node):
    if _named(node) is not None:
        yield _named(node)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            part.value if isinstance(part, ast.Constant) else _named(part.value) or "{}"
            for part in node.values
        )
    else:
        for inner in ast.iter_child_nodes(node):
            yield from _texts(inner)


def test_every_reason_in_the_sources_has_a_row():
    known = {row.sentence for row in ROWS} | set(DIRECT) | set(ELSEWHERE)
    found = {text: path.relative_to(ROOT) for path in sources() for text in sentences_in(path)}
    missing = {text: str(path) for text, path in found.items() if text not in known}
    assert not missing, "reasons without a row in tests/reasons"
    assert known <= set(found), "rows whose sentence is in no source"


@pytest.mark.parametrize("sentence", ELSEWHERE)
def test_a_reason_that_another_test_gives_is_looked_for_there(sentence):
    file, phrase = ELSEWHERE[sentence]
    assert phrase in (TESTS / file).read_text(encoding="utf-8")


def test_no_two_rows_have_one_name():
    counts = Counter((row.said, row.id) for row in ROWS)
    assert [name for name, count in counts.items() if count > 1] == []
