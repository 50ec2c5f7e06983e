"""The sentences of docs/distributed.md are those of the library."""

import pytest
from distributed_page import PAGE

from softprompt.engine import sharding

TEXT = PAGE.read_text()


@pytest.mark.parametrize(
    "sentence", [sharding.UNCHECKED, sharding.DISAGREE, sharding.ONLY_FORWARD, sharding.NOT_EMBEDDED]
)
def test_a_sentence_of_the_library_is_on_the_page(sentence):
    assert sentence in TEXT
