"""What cannot be served on several devices is named in one sentence, and PEFT's forward gives the result."""

import re
import warnings

import pytest
import torch
from parity import make_batch, step
from sharded_models import cut_into_stages, flattened, partitioned, replica
from tiny_models import pair, prompted

import softprompt

BATCH = make_batch(side="left", labels="everywhere")


CASES = {
    "ZeRO-3": (partitioned, "DeepSpeed ZeRO-3 partitions the weights"),
    "pipeline": (cut_into_stages, "the model is cut into pipeline stages"),
    "FSDP1": (flattened, "FSDP1 (FullyShardedDataParallel) flattens the weights"),
    "DataParallel": (replica, "nn.DataParallel copies the model in every step"),
}


@pytest.mark.parametrize("change, sentence", CASES.values(), ids=CASES)
@pytest.mark.parametrize("patched_first", [True, False])
def test_one_warning_names_it_and_the_result_is_that_of_peft(change, sentence, patched_first):
    stock, fast = pair(prompted("llama"))
    expected = step(stock, BATCH)
    prompts = fast.prompt_encoder
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if patched_first:
            fast = change(softprompt.patch(fast))
        elif change is not replica:
            fast = softprompt.patch(change(fast))
        else:
            fast = softprompt.patch(fast)
            fast(**BATCH).loss.backward()  # in use before
            fast.zero_grad()
            fast = change(fast)
        for _ in range(2):
            loss = fast(**BATCH).loss
    loss.backward()
    messages = [str(w.message) for w in caught if sentence in str(w.message)]
    assert len(messages) == 1
    assert torch.equal(loss.detach(), expected.loss)
    assert torch.equal(prompts["default"].embedding.weight.grad, *expected.grads.values())


@pytest.mark.parametrize("change, sentence", list(CASES.values())[:3], ids=list(CASES)[:3])
def test_it_may_be_an_error_and_can_be_read_in_the_report(change, sentence):
    model = change(prompted("llama"))
    assert sentence in softprompt.explain(model).reason
    with pytest.raises(softprompt.UnsupportedModelError, match=re.escape(sentence)):
        softprompt.patch(model, on_unsupported="error")
