import json
import math

import pytest

from softprompt.tasks.metrics import exact_match, perplexity, to_json


def test_exact_match_is_the_share_of_equal_rows():
    assert exact_match(["a", "b", "c", "d"], ["a", "x", "c", "y"]) == 0.5
    assert exact_match(["no complaint"], ["complaint"]) == 0.0


@pytest.mark.parametrize("predicted, expected", [([], []), (["a"], ["a", "b"])])
def test_exact_match_needs_as_many_predictions_as_labels(predicted, expected):
    with pytest.raises(ValueError, match="expected as many predictions as labels"):
        exact_match(predicted, expected)


@pytest.mark.parametrize("loss, value", [(0.0, 1.0), (math.log(8), 8.0), (1e4, math.inf)])
def test_perplexity_is_the_exponential_of_the_loss(loss, value):
    assert perplexity(loss) == pytest.approx(value)


def test_json_holds_null_for_numbers_that_json_does_not_have():
    text = to_json({"a": math.inf, "b": [1.5, math.nan], "c": {"d": 2, "e": "ä"}})
    assert json.loads(text) == {"a": None, "b": [1.5, None], "c": {"d": 2, "e": "ä"}}
