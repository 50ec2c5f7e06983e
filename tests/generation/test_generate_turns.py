"""Calls of one model beside each other in threads, and inside of each other."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generating import BATCH, NEW, patched, speaker, tokens, two_adapters
from parity import make_batch
from tiny_models import pair
from transformers import LogitsProcessor

import softprompt


def test_threads_that_share_a_model_get_their_own_tokens():
    fast = patched(two_adapters("llama"))
    batches = [make_batch(lengths, side="left", labels=None) for lengths in ((7, 3), (2, 5, 8, 1))]
    expected = [fast.generate(**batch, max_new_tokens=NEW) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(fast.generate, **batches[i % 2], max_new_tokens=NEW) for i in range(8)]
        for i, job in enumerate(jobs):
            assert torch.equal(job.result(), expected[i % 2])


def in_threads(*jobs):
    """Runs the jobs beside each other, and returns what was wrong in any of them."""
    wrong = []

    def safely(job):
        try:
            job(wrong)
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=safely, args=(job,)) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return wrong


def test_generate_and_forward_in_threads_take_turns():
    fast, batch = patched(speaker("llama")), make_batch()
    expected, loss = tokens(fast), float(fast(**batch).loss)

    def generates(wrong):
        for _ in range(4):
            if not torch.equal(fast.generate(**BATCH, max_new_tokens=NEW), expected):
                wrong.append("tokens")

    def computes(wrong):
        for _ in range(20):
            if abs(float(fast(**batch).loss) - loss) > 1e-9:
                wrong.append("loss")

    assert in_threads(generates, computes, generates) == []


@pytest.mark.filterwarnings("ignore:softprompt")
def test_pefts_own_generate_in_another_thread_takes_turns():
    fast = softprompt.patch(speaker("llama"))
    expected = tokens(fast)

    def generates(**options):
        def job(wrong):
            for _ in range(4):
                if not torch.equal(fast.generate(**BATCH, max_new_tokens=NEW, **options), expected):
                    wrong.append(str(options))

        return job

    assert in_threads(generates(), generates(use_cache=False)) == []


class Within(LogitsProcessor):
    """Does something in the middle of a call."""

    def __init__(self, do):
        self.do, self.got = do, []

    def __call__(self, input_ids, scores):
        self.got.append(self.do())
        return scores


@pytest.mark.filterwarnings("ignore:softprompt")
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, {"num_beams": 2}, {"use_cache": False}])
def test_a_call_inside_of_a_call_leaves_both_right(options):
    fast = softprompt.patch(speaker("llama"))
    batch = make_batch((5, 2), side="left", labels=None)
    inner, outer = tokens(fast, batch, **options), tokens(fast, repetition_penalty=1.3)
    within = Within(lambda: fast.generate(**batch, max_new_tokens=NEW, **options))
    assert torch.equal(tokens(fast, repetition_penalty=1.3, logits_processor=[within]), outer)
    assert all(torch.equal(got, inner) for got in within.got)


def test_a_call_without_adapters_inside_of_a_call_leaves_both_right():
    fast = patched(speaker("llama"))

    def bare():
        with fast.disable_adapter():
            return fast.generate(**BATCH, max_new_tokens=2)

    inner, outer = bare(), tokens(fast)
    within = Within(bare)
    assert torch.equal(tokens(fast, logits_processor=[within]), outer)
    assert all(torch.equal(got, inner) for got in within.got)


def test_an_interrupted_generate_of_peft_does_not_change_later_calls():
    def interrupt():
        raise KeyboardInterrupt

    stock, fast = pair(speaker("llama"))
    for model in (fast, patched(fast)):
        with pytest.raises(KeyboardInterrupt), model.disable_adapter():
            tokens(model, logits_processor=[Within(interrupt)])
        with pytest.raises(KeyboardInterrupt):
            tokens(model, logits_processor=[Within(interrupt)])
    assert torch.equal(tokens(fast), tokens(stock))


def test_warnings_name_the_line_of_the_call():
    fast = softprompt.patch(speaker("gpt2-dropout"))
    with pytest.warns(UserWarning, match="PEFT's own generate") as caught:
        fast.generate(**BATCH, max_new_tokens=NEW, use_cache=False)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="PEFT's own forward") as caught:
        fast(**BATCH, output_hidden_states=True)
    assert caught[0].filename == __file__
    fast.train()
    with pytest.warns(UserWarning, match="frozen model has dropout") as caught:
        fast(**make_batch())
    assert caught[0].filename == __file__
