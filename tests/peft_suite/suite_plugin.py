"""A pytest plugin: the prompt-tuning cases of PEFT's tests, on local models, patched or not."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import MultitaskPromptTuningConfig, PromptEncoderConfig, PromptTuningConfig
from suite_models import local_models
from suite_patching import Counts, patching

CONFIGURATIONS = (PromptTuningConfig, PromptEncoderConfig, MultitaskPromptTuningConfig)
NAMES = re.compile("|".join(rf"\b{cls.__name__}\b" for cls in CONFIGURATIONS))
# The worst of setup, call and teardown counts.
_ORDER = ("passed", "skipped", "failed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite-record", required=True, help="file for the outcomes")
    parser.addoption("--suite-patch", action="store_true", help="patch the models")


def pytest_configure(config: pytest.Config) -> None:
    # Before the test modules are imported, which keep what they find.
    config.pluginmanager.register(_Suite(config), "softprompt-suite")


class _Always(dict[str, int]):
    """PEFT's tests go offline for the names in here."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


class _Suite:
    def __init__(self, config: pytest.Config) -> None:
        self._record = Path(config.getoption("--suite-record"))
        self._stack = contextlib.ExitStack()
        self._models = self._stack.enter_context(local_models())
        patched = config.getoption("--suite-patch")
        self._counts: Counts | None = self._stack.enter_context(patching()) if patched else None
        self._outcomes: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._not_collected: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._not_collected[report.nodeid] = str(report.longrepr).strip().splitlines()[-1]

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if about_prompts(item)]
        dropped = [item for item in items if item not in set(chosen)]
        config.hook.pytest_deselected(items=dropped)
        items[:] = chosen
        for module in {getattr(item, "module", None) for item in chosen}:
            helpers = inspect.getmodule(getattr(module, "hub_online_once", None))
            if hasattr(helpers, "_HUB_MODEL_ACCESSES"):
                helpers._HUB_MODEL_ACCESSES = _Always()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        known = self._outcomes.get(report.nodeid, "passed")
        self._outcomes[report.nodeid] = max(known, report.outcome, key=_ORDER.index)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash is not None else str(report.longrepr)
            self._reasons[report.nodeid] = next(iter(text.splitlines()), "")

    def pytest_sessionfinish(self) -> None:
        record = {
            "outcomes": self._outcomes,
            "reasons": self._reasons,
            "not_collected": self._not_collected,
            "names": self._models.names,
            "models": dict(self._counts.models) if self._counts else {},
            "calls": dict(self._counts.calls) if self._counts else {},
        }
        self._record.write_text(json.dumps(record))
        self._stack.close()


def about_prompts(item: Any) -> bool:
    """Whether a test is about one of the types of adapters that are patched."""
    callspec = getattr(item, "callspec", None)
    values = list(callspec.params.values()) if callspec is not None else []
    configurations = [value for value in values if _is_configuration(value)]
    if configurations:
        return any(value in CONFIGURATIONS or isinstance(value, CONFIGURATIONS) for value in configurations)
    if "prompt_tuning" in item.path.name:
        return True
    return bool(NAMES.search(inspect.getsource(item.function)))


def _is_configuration(value: Any) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__.endswith("Config") and kind.__module__.startswith("peft.")
