import pytest
import torch

from softprompt.tasks.classification import Encoder, TextTask
from softprompt.tasks.inference import label_texts


class Speller(torch.nn.Module):
    """Writes "complaint" where the text has an a, else "no complaint"; its loss is the number of its call."""

    def __init__(self, ids):
        super().__init__()
        self.device = torch.device("cpu")
        self.ids, self.widths, self.modes, self.calls = ids, [], [], 0

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        self.widths.append(input_ids.shape[1])
        self.modes.append(self.training)
        assert (attention_mask.sum(1) == (input_ids != 3).sum(1)).all()
        answers = [
            "complaint <pad> a" if self.ids("a")[0] in row else "no complaint <pad>" for row in input_ids
        ]
        new = torch.tensor([self.ids(answer) for answer in answers])
        assert new.shape[1] == max_new_tokens
        return torch.cat([input_ids, new], dim=1)


@pytest.fixture
def build(tokenizer):
    def make(padding):
        task = TextTask("Tweet text", "Label", ("complaint", "no complaint"), max_length=16, padding=padding)
        return Encoder(task, tokenizer)

    return make


TEXTS = ["a", "b c", "d e a", "f", "g h i j"]


@pytest.mark.parametrize("padding, widths", [("max_length", [13, 13, 13]), ("longest", [7, 8, 9])])
def test_every_text_gets_the_label_that_the_model_writes(build, ids, padding, widths):
    model, done = Speller(ids).train(), []
    labels = label_texts(model, build(padding), TEXTS, batch_size=2, progress=done.append)
    assert labels == ["complaint", "no complaint", "complaint", "no complaint", "no complaint"]
    assert model.widths == widths
    assert done == [2, 2, 1]
    assert model.modes == [False] * 3
    assert model.training
