"""Trainer and accelerate's loop behind `accelerate launch`: every check of accelerate_checks.py is a test."""

import accelerate_checks
import pytest
import ranks

pytestmark = pytest.mark.slow(seconds=30)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerate")
    environment = {"ACCELERATE_USE_CPU": "true", "SOFTPROMPT_TEST_FOLDER": str(folder)}
    return ranks.launch(["accelerate_checks"], folder, launcher=ranks.ACCELERATE, environment=environment)


@pytest.mark.parametrize("check", ranks.checks_of(accelerate_checks))
def test_two_ranks(check, launched):
    ranks.outcome(launched, f"accelerate_checks.{check}")
