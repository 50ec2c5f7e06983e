"""A tokenizer of whole words, so that tests can count tokens by eye."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", "<pad>", ":", "Tweet", "text", "Label", "complaint", "no", *"abcdefghij"]


@pytest.fixture(scope="session")
def make_tokenizer():
    def make(**special):
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def ids():
    """Token ids of a sentence, by the list above."""
    return lambda sentence: [WORDS.index(word) for word in sentence.split()]
