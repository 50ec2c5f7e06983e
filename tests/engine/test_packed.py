"""Every architecture on its fast route: PEFT's loss, logits at real tokens and prompt gradient."""

import pytest
import torch
from marks import slow_unless
from parity import assert_close, assert_same_step, make_batch, prompt_of, step
from tiny_models import PACKED, PADDED, build, pair, prompted

import softprompt
from softprompt.engine import plan_for
from softprompt.engine.batch import check_batch
from softprompt.engine.losses import label_losses, weighted_sum

BATCHES = {
    "right padding, answers": make_batch(),
    "left padding, answers": make_batch(side="left"),
    "right padding, all tokens": make_batch(labels="everywhere"),
    "left padding, all tokens": make_batch(side="left", labels="everywhere"),
    "left padding, first tokens": make_batch(side="left", labels="first"),
    "right padding, first tokens": make_batch(labels="first"),
    "right padding, pads too": make_batch(labels="pads"),
    "left padding, pads too": make_batch(side="left", labels="pads"),
    "holes": make_batch(side="left", labels="everywhere", holes=True),
    "no pads": make_batch((6, 6), labels="everywhere", width=6),
    "no mask": {k: v for k, v in make_batch((6, 6), width=6).items() if k != "attention_mask"},
}
MODELS = [(name, None) for name in (*PACKED, *PADDED)] + [
    (name, "eager") for name in ("gpt2", "mistral-window", "opt", "llama")
]
IDS = [name if implementation is None else f"{name}-{implementation}" for name, implementation in MODELS]


# Each way of positions, windows, biases and caps once; the others take one of these batches below.
QUICK = ("bloom", "llama", "gpt2", "gemma2", "opt", "mistral-window", "gpt_oss", "mamba", "qwen3_next")


@pytest.mark.parametrize("name, implementation", slow_unless(lambda case: case[0] in QUICK, MODELS), ids=IDS)
def test_a_patched_model_gives_the_numbers_of_peft(name, implementation):
    stock, fast = pair(prompted(name, implementation=implementation))
    softprompt.patch(fast, on_unsupported="error")
    assert softprompt.explain(fast).route == ("padded" if name in PADDED else "packed")
    for title, batch in BATCHES.items():
        try:
            assert_same_step(fast, stock, batch)
        except AssertionError as error:
            raise AssertionError(f"{title}: {error}") from error


@pytest.mark.parametrize("name, implementation", MODELS, ids=IDS)
def test_fp32_models_agree_to_fp32_accuracy(name, implementation):
    stock, fast = pair(prompted(name, torch.float32, implementation))
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, make_batch(side="left", labels="everywhere"), bound=3e-5)


def test_the_softcap_that_sdpa_leaves_out_is_left_out():
    try:
        model = prompted("gemma2", implementation="sdpa")
    except ValueError as error:
        pytest.skip(f"this transformers refuses it: {error}")
    stock, fast = pair(model)
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, make_batch(side="left", labels="everywhere"))


@pytest.mark.parametrize("name", PACKED)
def test_compact_positions_equal_each_row_alone_without_padding(name):
    stock, fast = pair(prompted(name))
    softprompt.patch(fast, positions="compact")
    lengths = (7, 2, 5)  # more pads than the window is wide
    batch = make_batch(lengths, "left", labels="everywhere")
    got = step(fast, batch, num_items_in_batch=1)
    loss, grad = 0.0, 0.0
    for row in range(len(lengths)):
        real = batch["attention_mask"][row].bool()
        alone = {key: value[row : row + 1, real] for key, value in batch.items()}
        one = step(stock, alone, num_items_in_batch=1)
        loss, grad = loss + one.loss.double(), grad + prompt_of(stock).grad.clone()
        columns = torch.cat([torch.ones(4, dtype=torch.bool), real])
        assert_close(got.logits[row, columns], one.logits[0], 2e-5, f"logits of row {row}")
    assert_close(got.loss, loss, 2e-6, "loss")
    assert_close(prompt_of(fast).grad, grad, 2e-5, "prompt gradient")


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma", "opt", "mistral-window", "gptj", "gpt_oss"])
def test_dummy_tokens_and_dummy_labels_change_nothing(name):
    model = build(name)
    plan = plan_for(model)
    batch = make_batch(side="left", labels="everywhere")
    results = []
    for buckets in ({}, {"token_bucket": 32, "label_bucket": 16}):
        torch.manual_seed(3)
        width = model.get_input_embeddings().embedding_dim
        prompt = torch.randn(4, width, dtype=torch.float64, requires_grad=True)
        checked = check_batch([prompt], width, **batch, inputs_embeds=None, prompt_of_row=None)
        rows = plan.decode(model, checked, plan.layout(checked, **buckets))
        losses = label_losses(model, rows, plan.head)
        loss = weighted_sum(losses, rows.label_targets, None, None)
        loss.backward()
        real = batch["attention_mask"].bool()
        results.append((rows, loss.detach(), prompt.grad, rows.padded(rows.hidden)[:, 4:][real].detach()))
    (plain, *expected), (rounded, *got) = results
    assert plain.hidden.shape[0] % 32 != 0
    assert rounded.hidden.shape[0] % 32 == 0
    assert len(plain.label_rows) % 16 != 0
    assert len(rounded.label_rows) % 16 == 0
    for what, value, true_value in zip(("loss", "gradient", "hidden rows"), got, expected, strict=True):
        assert_close(value, true_value, 1e-6, what)
