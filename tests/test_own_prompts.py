"""Prompt encoders and `get_prompt` of a user's own are asked as PEFT asks them."""

import types

import pytest
import seq2seq_models
import torch
from encoder_models import encoded
from generating import tokens
from parity import assert_close, assert_same_step, make_batch, step
from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM
from tiny_models import pair, prompt_config, prompted
from torch import nn

import softprompt

BATCH = make_batch(side="left", labels="everywhere")
TASKS = {"task_ids": torch.tensor([2, 0, 2])}


def assert_packed(model):
    report = softprompt.explain(model)
    assert report.route in ("packed", "padded")
    assert report.fallbacks == ()


# ------------------------------------------------------------------------------------------------- encoders
class Own(nn.Module):
    """What stands in place of PEFT's encoder, around its embedding; PEFT looks for the latter."""

    def __init__(self, stock):
        super().__init__()
        self.embedding = stock.embedding
        width, dtype = stock.embedding.embedding_dim, stock.embedding.weight.dtype
        torch.manual_seed(5)
        self.inner = self.make(width).to(dtype)

    def make(self, width):
        return nn.Linear(width, 1, bias=False)  # a softmax has no gradient for one


class Gate(Own):
    """Sums over the prompt, which is dim 1."""

    def forward(self, indices):
        rows = self.embedding(indices)
        return rows + (self.inner(rows).softmax(1) * rows).sum(1, keepdim=True)


class Convolution(Own):
    """Takes [1, H, P]."""

    def make(self, width):
        return nn.Conv1d(width, width, 3, padding=1)

    def forward(self, indices):
        return self.inner(self.embedding(indices).transpose(1, 2)).transpose(1, 2)


class OneRow(Own):
    """Gives [P, H], which PEFT repeats for each row as well."""

    def forward(self, indices):
        rows = self.embedding(indices)[0]
        return rows * self.inner(rows)


class Attention(Own):
    """Rows of the prompt look at each other; needs a batch dimension."""

    def make(self, width):
        return nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, indices):
        rows = self.embedding(indices)
        return self.inner(rows, rows, rows)[0]


def hook_on_encoder(model):
    model.prompt_encoder["default"].register_forward_hook(
        lambda module, args, output: output - output.mean(1, keepdim=True)
    )


def hook_on_embedding(model):
    model.prompt_encoder["default"].embedding.register_forward_hook(
        lambda module, args, output: output * output.shape[1] + args[0].ndim
    )


def hook_before(model):
    model.prompt_encoder["default"].register_forward_pre_hook(lambda module, args: (args[0].flip(1),))


def forward_on_instance(model):
    encoder = model.prompt_encoder["default"]
    stock = encoder.forward
    encoder.forward = lambda indices: stock(indices).cumsum(1)


def module(kind):
    def change(model):
        model.prompt_encoder["default"] = kind(model.prompt_encoder["default"])

    change.__name__ = kind.__name__
    return change


CHANGES = [
    hook_on_encoder,
    hook_on_embedding,
    hook_before,
    forward_on_instance,
    *map(module, (Gate, Convolution, OneRow, Attention)),
]
changes = pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])


def both(model, change, moment):
    """A PEFT model and its patched twin, changed after or before the patch."""
    stock, fast = pair(model)
    change(stock)
    if moment == "before":
        change(fast)
    softprompt.patch(fast, on_unsupported="error")
    if moment == "after":
        change(fast)
    return stock, fast


@changes
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_an_encoder_is_called_as_peft_calls_it(change, moment, name):
    stock, fast = both(prompted(name), change, moment)
    assert_same_step(fast, stock, BATCH)
    assert_packed(fast)


@changes
def test_generate_begins_with_what_such_an_encoder_gives(change):
    stock, fast = both(prompted("llama"), change, "after")
    stock.eval(), fast.eval()
    texts = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(tokens(fast, texts), tokens(stock, texts))
    assert_packed(fast)


@changes
def test_an_encoder_of_an_encoder_decoder_is_called_as_peft_calls_it(change):
    stock, fast = both(seq2seq_models.prompted("t5"), change, "after")
    batch = seq2seq_models.seq2seq_batch()
    expected, got = step(stock, batch), step(fast, batch)
    assert_close(got.loss, expected.loss, 1e-6, "loss")
    for name, grad in expected.grads.items():
        assert_close(got.grads[name], grad, 2e-5, name)
    assert_packed(fast)


@pytest.mark.parametrize("change", [hook_on_encoder, hook_before], ids=["output", "input"])
@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_hooks_on_p_tuning_see_pefts_shapes(kind, change):
    stock, fast = both(encoded(kind), change, "after")
    assert_same_step(fast, stock, BATCH)
    assert_packed(fast)


def over_all_rows(model):
    """The encoder of multitask prompt tuning sees the whole batch, [B, P]."""
    model.prompt_encoder["default"].register_forward_hook(
        lambda module, args, output: output - output.mean(0, keepdim=True) / args[0].shape[0]
    )


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_hook_on_multitask_prompt_tuning_sees_all_rows(moment):
    stock, fast = both(encoded("multitask"), over_all_rows, moment)
    with pytest.warns(UserWarning, match="has hooks, or is not PEFT's: it is asked for the prompt of each"):
        fast(**BATCH, **TASKS)
    assert_same_step(fast, stock, BATCH, **TASKS)
    assert_packed(fast)


def test_an_encoder_that_gives_several_rows_is_an_error():
    model = softprompt.patch(prompted("llama"))
    model.prompt_encoder["default"].register_forward_hook(lambda module, args, output: output.repeat(2, 1, 1))
    with pytest.raises(ValueError, match=r"must give \[1, P, H\] = \[1, 4, H\], got \[2, 4, 48\]"):
        model(**BATCH)


# ----------------------------------------------------------------------------------------------- get_prompt
def scaled(self, batch_size, task_ids=None, max_cache_len=None):
    return 2 * _STOCK(self, batch_size, task_ids)


def by_row(self, batch_size, task_ids=None, max_cache_len=None):
    """Another prompt for each row."""
    prompts = _STOCK(self, batch_size, task_ids)
    factors = torch.arange(1, batch_size + 1, dtype=prompts.dtype)
    return prompts * factors[:, None, None]


def over_the_batch(self, batch_size, task_ids=None, max_cache_len=None):
    """Depends on how many rows there are."""
    return _STOCK(self, batch_size, task_ids) / batch_size


_STOCK = PeftModelForCausalLM.get_prompt
OWN = [scaled, by_row, over_the_batch]
own = pytest.mark.parametrize("get_prompt", OWN, ids=[function.__name__ for function in OWN])


def replace(model, get_prompt, place, monkeypatch):
    if place == "instance":
        model.get_prompt = types.MethodType(get_prompt, model)
    elif place == "class":
        kind = PeftModelForSeq2SeqLM if isinstance(model, PeftModelForSeq2SeqLM) else PeftModelForCausalLM
        monkeypatch.setattr(kind, "get_prompt", get_prompt, raising=False)
    else:
        model.__class__ = type("Sub", (PeftModelForCausalLM,), {"get_prompt": get_prompt})


@own
@pytest.mark.parametrize("place", ["instance", "class", "subclass"])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_get_prompt_from_before_the_patch_is_called(get_prompt, place, name, monkeypatch):
    stock, fast = pair(prompted(name))
    for model in (stock, fast):
        replace(model, get_prompt, place, monkeypatch)
    softprompt.patch(fast, on_unsupported="error")
    with pytest.warns(UserWarning, match="get_prompt was replaced: it is asked for the prompt of each row"):
        fast(**BATCH)
    assert_same_step(fast, stock, BATCH)
    assert_packed(fast)


@own
@pytest.mark.parametrize("place", ["instance", "class"])
def test_a_get_prompt_from_behind_the_patch_is_called(get_prompt, place, monkeypatch):
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast)
    plain = step(fast, BATCH).loss
    replace(stock, get_prompt, place, monkeypatch)
    if place == "instance":
        replace(fast, get_prompt, place, monkeypatch)
    assert_same_step(fast, stock, BATCH)
    assert step(fast, BATCH).loss != plain
    stock.eval(), fast.eval()
    texts = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(tokens(fast, texts), tokens(stock, texts))
    monkeypatch.undo()
    if place == "instance":
        del fast.get_prompt
    assert_close(step(fast.train(), BATCH).loss, plain, 1e-9, "loss of PEFT's own again")


@own
def test_an_encoder_decoder_asks_a_get_prompt_of_its_own(get_prompt, monkeypatch):
    stock, fast = pair(seq2seq_models.prompted("t5"))
    softprompt.patch(fast, on_unsupported="error")
    for model in (stock, fast):
        replace(model, get_prompt, "instance", monkeypatch)
    batch = seq2seq_models.seq2seq_batch()
    expected, got = step(stock, batch), step(fast, batch)
    assert_close(got.loss, expected.loss, 1e-6, "loss")
    for name, grad in expected.grads.items():
        assert_close(got.grads[name], grad, 2e-5, name)
    assert_packed(fast)


def test_a_get_prompt_of_multitask_prompt_tuning_gets_the_tasks(monkeypatch):
    stock, fast = both(encoded("multitask"), lambda model: replace(model, by_row, "instance", None), "after")
    assert_same_step(fast, stock, BATCH, **TASKS)
    for tasks in ([2, 0, 2], torch.tensor([1])):
        ours = step(fast, BATCH, task_ids=tasks).loss
        theirs = step(stock, BATCH, task_ids=torch.as_tensor(tasks).expand(3)).loss
        assert_close(ours, theirs, 2e-6, "loss")


def test_ensembles_and_other_adapters_say_that_such_prompts_are_not_theirs():
    model = prompted("llama")
    model.add_adapter("second", prompt_config(model.get_base_model()))
    softprompt.patch(model)
    model.get_prompt = types.MethodType(scaled, model)
    with pytest.raises(softprompt.UnsupportedModelError, match="get_prompt was replaced, and only forward"):
        softprompt.ensemble.losses(model, **BATCH)
    with pytest.raises(softprompt.UnsupportedModelError, match="prompts of the active adapter alone"):
        model(**BATCH, adapter_names=["default", "second", "default"])
    same = model(**BATCH, adapter_names=["default"] * 3).loss
    assert torch.equal(same, model(**BATCH).loss)


def test_what_get_prompt_must_give_is_said():
    model = softprompt.patch(prompted("llama"))
    model.get_prompt = lambda batch_size, task_ids=None: torch.zeros(4, 48)
    with pytest.raises(ValueError, match=r"get_prompt must give \[B, P, H\] = \[3, 4, H\], got \[4, 48\]"):
        model(**BATCH)
