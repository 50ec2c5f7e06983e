"""Random batches through a patched model and, adapter by adapter, through PEFT."""

import fuzzing
import pytest
from hypothesis import HealthCheck, given, settings
from tiny_models import PADDED

ANYTHING = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("name", fuzzing.MODELS)
def test_any_batch_gives_the_result_of_peft(name):
    @ANYTHING
    @given(case=fuzzing.cases(compact=name not in PADDED))
    def run(case):
        fuzzing.check(name, case)

    run()
