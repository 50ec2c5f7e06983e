"""`softprompt.forward`: a causal LM, prompts and a batch, without PEFT around it."""

import functools
import warnings

import pytest
import torch
from parity import assert_close, make_batch, prompt_of, relative_error
from tiny_models import build, pair, with_prompt
from torch import nn

import softprompt

BATCH = make_batch(side="left", labels="everywhere")


@functools.cache
def model_of(name):
    return build(name)


def random_prompts(*lengths, width=48, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, width, generator=generator, dtype=torch.float64).requires_grad_()
        for length in lengths
    ]


def peft_result(base, prompt, batch, **kwargs):
    """Loss, logits and prompt gradient of PEFT with this prompt."""
    model = with_prompt(base, prompt.shape[0])
    with torch.no_grad():
        prompt_of(model).copy_(prompt)
    output = model(**batch, **kwargs)
    output.loss.backward()
    return output.loss.detach(), output.logits.detach(), prompt_of(model).grad


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom-6-heads", "mamba", "gemma2"])
def test_one_prompt_gives_the_result_of_peft(name):
    base = model_of(name)
    (prompt,) = random_prompts(5)
    output = softprompt.forward(base, prompt, **BATCH, on_unsupported="error")
    output.loss.backward()
    loss, logits, grad = peft_result(base, prompt.detach(), BATCH)
    assert_close(output.loss.detach(), loss, 2e-6, "loss")
    assert_close(prompt.grad, grad, 2e-5, "prompt gradient")
    real = BATCH["attention_mask"].bool()
    assert_close(output.logits[:, 5:][real].detach(), logits[:, 5:][real], 2e-5, "logits")
    assert output.logits.shape == logits.shape


@pytest.mark.parametrize(
    "name", ["llama", "bloom", "mistral-window", "gptj", "falcon", "gpt_oss", "qwen2-window"]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_several_prompts_give_each_row_the_result_of_its_own(name, side):
    base = model_of(name)
    width = base.get_input_embeddings().embedding_dim
    prompts = random_prompts(3, 6, 1, width=width)
    rows = [1, 0, 1, 2]
    batch = make_batch((6, 4, 7, 5), side, "everywhere")
    output = softprompt.forward(base, prompts, **batch, prompt_of_row=rows, num_items_in_batch=1)
    output.loss.backward()
    total = 0
    grads = [torch.zeros_like(prompt) for prompt in prompts]
    for row, number in enumerate(rows):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        loss, logits, grad = peft_result(base, prompts[number].detach(), one, num_items_in_batch=1)
        total, grads[number] = total + loss, grads[number] + grad
        real = one["attention_mask"][0].bool()
        length = prompts[number].shape[0]
        assert_close(
            output.logits[row, 6:][real].detach(), logits[0, length:][real], 2e-5, f"logits of row {row}"
        )
        assert_close(
            output.logits[row, 6 - length : 6].detach(), logits[0, :length], 2e-5, f"prompt of row {row}"
        )
    assert_close(output.loss.detach(), total, 2e-6, "loss")
    for number, prompt in enumerate(prompts):
        assert_close(prompt.grad, grads[number], 2e-5, f"gradient of prompt {number}")


def test_a_prompt_that_no_row_sees_gets_a_zero_gradient():
    prompts = random_prompts(3, 4)
    softprompt.forward(model_of("llama"), prompts, **BATCH, prompt_of_row=[1, 1, 1]).loss.backward()
    assert torch.equal(prompts[0].grad, torch.zeros_like(prompts[0]))
    assert prompts[1].grad.norm() > 0


def test_rows_of_one_prompt_see_nothing_of_another():
    first, other, changed = random_prompts(3, 4, 4)
    results = [
        softprompt.forward(model_of("llama"), [first, second], **BATCH, prompt_of_row=[0, 1, 0]).logits
        for second in (other, changed)
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][2], results[1][2])
    assert relative_error(results[0][1], results[1][1]) > 1e-2


def test_without_labels_there_is_no_loss():
    (prompt,) = random_prompts(4)
    output = softprompt.forward(model_of("llama"), prompt, BATCH["input_ids"])
    assert output.loss is None
    assert output.logits.shape == (3, 12, 97)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
def test_gradients_come_in_the_dtype_of_the_prompt(name):
    base = model_of(name)
    (prompt,) = random_prompts(4, width=base.get_input_embeddings().embedding_dim)
    single = prompt.detach().float().requires_grad_()
    for leaf in (prompt, single):
        softprompt.forward(base, leaf, **BATCH).loss.backward()
    assert single.grad.dtype == torch.float32
    assert_close(single.grad, prompt.grad, 1e-5, "prompt gradient")


def test_a_prompt_may_be_computed():
    """Gradients reach what a prompt was made from."""
    (small,) = random_prompts(2)
    prompt = torch.cat([small, small * 2])
    softprompt.forward(model_of("llama"), prompt, **BATCH).loss.backward()
    leaf = prompt.detach().requires_grad_()
    softprompt.forward(model_of("llama"), leaf, **BATCH).loss.backward()
    assert_close(small.grad, leaf.grad[:2] + 2 * leaf.grad[2:], 1e-10, "gradient")


def moved_left(batch):
    """The rows of a right-padded batch, with the pads on the left."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return {
        name: torch.stack([row.roll(len(row) - n) for row, n in zip(value, lengths, strict=True)])
        for name, value in batch.items()
    }


@pytest.mark.parametrize("name", ["llama", "mistral-window", "opt", "bloom"])
def test_compact_positions_make_both_paddings_equal(name):
    base = model_of(name)
    (prompt,) = random_prompts(4, width=base.get_input_embeddings().embedding_dim)
    right = make_batch(side="right")
    for positions in ("padded", "compact"):
        losses = [
            softprompt.forward(base, prompt, **batch, positions=positions).loss.detach()
            for batch in (right, moved_left(right))
        ]
        counts_pads = positions == "padded" and name in ("llama", "mistral-window")
        assert (relative_error(losses[1], losses[0]) > 1e-3) == counts_pads
    assert_close(losses[1], losses[0], 1e-9, "loss")


def test_compact_positions_need_a_packed_route():
    (prompt,) = random_prompts(4)
    with pytest.raises(
        softprompt.UnsupportedModelError, match=r'positions="compact" needs the packed route: .*mamba'
    ):
        softprompt.forward(model_of("mamba"), prompt, **BATCH, positions="compact")


def broken():
    """A model for which no fast route is right."""
    base = build("llama")
    base.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    return base


def test_a_model_without_a_fast_route_warns_and_gives_its_own_result():
    base = broken()
    (prompt,) = random_prompts(4)
    with pytest.warns(UserWarning, match="the model's own forward is used"):
        output = softprompt.forward(base, prompt, **BATCH)
    loss, logits, grad = peft_result(base, prompt.detach(), BATCH)
    output.loss.backward()
    assert torch.equal(output.loss, loss)
    assert torch.equal(output.logits, logits)
    assert_close(prompt.grad, grad, 1e-12, "prompt gradient")


def test_a_model_without_a_fast_route_may_be_an_error():
    base = broken()
    prompts = random_prompts(4, 5)
    with pytest.raises(softprompt.UnsupportedModelError, match="own forward is used"):
        softprompt.forward(base, prompts[0], **BATCH, on_unsupported="error")
    with pytest.raises(softprompt.UnsupportedModelError, match="own forward is used"):
        softprompt.forward(base, prompts, **BATCH, prompt_of_row=[0, 1, 0])


ALL_IGNORED = BATCH | {"labels": torch.full_like(BATCH["labels"], -100)}


@pytest.mark.parametrize("name", ["llama", "bloom", "opt", "recurrent_gemma", "mamba"])
def test_a_batch_without_labels_that_count_has_loss_zero_and_a_zero_gradient(name):
    base = model_of(name)
    (prompt,) = random_prompts(4, width=base.get_input_embeddings().embedding_dim)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = softprompt.forward(base, prompt, **ALL_IGNORED).loss
        loss.backward()
    assert sum("every label of this batch is -100" in str(warning.message) for warning in caught) == 1
    assert loss.item() == 0
    assert torch.equal(prompt.grad, torch.zeros_like(prompt))


def test_a_prompt_survives_a_batch_without_labels():
    """PEFT's NaN loss would destroy it at the next optimizer step."""
    (prompt,) = random_prompts(4)
    optimizer = torch.optim.SGD([prompt], lr=0.1)
    before = prompt.detach().clone()
    with pytest.warns(UserWarning, match="every label"):
        softprompt.forward(model_of("llama"), prompt, **ALL_IGNORED).loss.backward()
    optimizer.step()
    assert torch.equal(prompt.detach(), before)


@pytest.mark.parametrize("name", ["llama", "bloom", "opt", "gpt2", "mamba", "mistral-window"])
@pytest.mark.parametrize(
    "lengths, width", [((0, 5, 0), 6), ((5, 0), 5), ((1, 1), 1), ((6,), 6), ((1,), 1), ((3,), 7)], ids=str
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_empty_short_and_single_rows(name, lengths, width, side):
    base = model_of(name)
    (prompt,) = random_prompts(4, width=base.get_input_embeddings().embedding_dim)
    batch = make_batch(lengths, side, "everywhere", width=width)
    output = softprompt.forward(base, prompt, **batch, on_unsupported="error")
    output.loss.backward()
    loss, logits, grad = peft_result(base, prompt.detach(), batch)
    assert_close(output.loss.detach(), loss, 2e-6, "loss")
    assert_close(prompt.grad, grad, 2e-5, "prompt gradient")
    real = batch["attention_mask"].bool()
    assert_close(output.logits[:, 4:][real].detach(), logits[:, 4:][real], 2e-5, "logits")
    assert_close(output.logits[:, :4].detach(), logits[:, :4], 2e-5, "logits of the prompt")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_no_columns_at_all_leave_the_prompt(name):
    base = model_of(name)
    (prompt,) = random_prompts(4)
    ids = torch.zeros(2, 0, dtype=torch.int64)
    mask = torch.zeros(2, 0)
    logits = softprompt.forward(base, prompt, ids, mask, on_unsupported="error").logits
    model = with_prompt(base, 4)
    with torch.no_grad():
        prompt_of(model).copy_(prompt)
    assert_close(logits.detach(), model(input_ids=ids, attention_mask=mask).logits.detach(), 2e-5, "logits")
    with pytest.warns(UserWarning, match="every label"):
        assert softprompt.forward(base, prompt, ids, mask, ids).loss.item() == 0


def test_a_frozen_model_gets_no_gradients():
    base = build("llama")
    (prompt,) = random_prompts(4)
    softprompt.forward(base, prompt, **BATCH).loss.backward()
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_model_that_moves_its_logits_keeps_doing_so():
    """The head is called where it is not plain, with everything that stands behind it."""
    base = build("llama")
    head = nn.Sequential(base.lm_head, nn.Softplus())
    head.weight = base.lm_head.weight
    base.set_output_embeddings(head)
    (prompt,) = random_prompts(4)
    output = softprompt.forward(base, prompt, **BATCH, on_unsupported="error")
    loss, logits, _ = peft_result(base, prompt.detach(), BATCH)
    assert_close(output.loss.detach(), loss, 2e-6, "loss")
    real = BATCH["attention_mask"].bool()
    assert_close(output.logits[:, 4:][real].detach(), logits[:, 4:][real], 2e-5, "logits")


def test_two_models_may_be_used_in_turns():
    first, second = pair(build("llama"))
    (prompt,) = random_prompts(4)
    losses = [softprompt.forward(model, prompt, **BATCH).loss for model in (first, second, first)]
    sum(losses).backward()
    (alone,) = random_prompts(4)
    softprompt.forward(first, alone, **BATCH).loss.backward()
    assert_close(prompt.grad, 3 * alone.grad, 1e-12, "prompt gradient")
