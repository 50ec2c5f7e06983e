"""Two processes behind torchrun: every check of the three modules is a test, and runs in the same pair."""

import ddp_checks
import fsdp_checks
import other_checks
import pytest
import ranks

pytestmark = pytest.mark.slow(seconds=60)

MODULES = {"data parallel": ddp_checks, "fsdp2": fsdp_checks, "others": other_checks}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    names = [module.__name__ for module in MODULES.values()]
    return ranks.launch(names, tmp_path_factory.mktemp("torchrun"), seconds=240)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(f"{module.__name__}.{check}", id=f"{kind}: {check.removeprefix('check_')}")
        for kind, module in MODULES.items()
        for check in ranks.checks_of(module)
    ],
)
def test_two_ranks(check, launched):
    ranks.outcome(launched, check)
