"""Data parallel training in two processes: every check of ddp_checks.py is a test."""

import ddp_checks
import pytest
import ranks


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return ranks.launch(["ddp_checks"], tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("check", ranks.checks_of(ddp_checks))
def test_two_ranks(check, launched):
    ranks.outcome(launched, check)
