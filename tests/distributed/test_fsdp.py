"""FSDP2 in two processes: every check of fsdp_checks.py is a test."""

import fsdp_checks
import pytest
import ranks


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return ranks.launch(["fsdp_checks"], tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("check", ranks.checks_of(fsdp_checks))
def test_two_ranks(check, launched):
    ranks.outcome(launched, check)
