"""TRL's fused head on a patched model says of every token what it says behind PEFT."""

import pytest
import torch
from parity import assert_close, make_batch, prompt_of
from tiny_models import pair, prompted

import softprompt
from softprompt.engine.trl_head import scores_tokens

pytest.importorskip("trl")
from trl.trainer.utils import add_fused_lm_head

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def with_heads(name, **options):
    """An unpatched and a patched model, both with TRL's head."""
    stock, fast = pair(prompted(name, torch.float32))
    softprompt.patch(fast, on_unsupported="error", **options)
    for model in (stock, fast):
        add_fused_lm_head(model.get_base_model(), temperature=0.7, outputs=OUTPUTS)
    return stock, fast


def scored(model, batch, **more):
    """The output, and the gradient of what SFT, DFT and DPO make of it."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, use_cache=False, fused_lm_head=True, **more)
    (output.log_probs.exp().sum() - output.entropy.sum() + output.loss).backward()
    return output, prompt_of(model).grad


@pytest.mark.parametrize("name", ["llama", "bloom", "opt", "gemma2", "granite", "cohere", "mamba"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_field_and_the_gradient_are_those_of_peft(name, side):
    stock, fast = with_heads(name)
    batch = make_batch(side=side, labels="everywhere")
    expected, true_grad = scored(stock, batch)
    got, grad = scored(fast, batch)
    assert type(got) is type(expected)
    assert got.keys() == expected.keys()
    for field, value in expected.items():
        assert_close(got[field], value, 1e-4, field)
    assert_close(grad, true_grad, 1e-4, "gradient")


def test_a_batch_without_labels_gives_zeros_and_a_zero_gradient_as_with_peft():
    stock, fast = with_heads("llama")
    batch = make_batch(labels="everywhere")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    expected, true_grad = scored(stock, batch)
    got, grad = scored(fast, batch)
    assert float(got.loss) == float(expected.loss) == 0
    assert torch.equal(got.log_probs, expected.log_probs)
    assert torch.equal(grad, true_grad)


def test_the_loss_is_divided_by_the_number_of_items():
    stock, fast = with_heads("llama")
    batch = make_batch(labels="answer")
    expected, got = (scored(model, batch, num_items_in_batch=11)[0].loss for model in (stock, fast))
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_compact_positions_score_each_row_as_if_it_were_alone():
    _, fast = with_heads("llama", positions="compact")
    batch = make_batch((7, 3), "left", "pads")
    both, _ = scored(fast, batch)
    for row, length in enumerate((7, 3)):
        alone, _ = scored(fast, {name: value[row : row + 1, -length:] for name, value in batch.items()})
        assert_close(both.log_probs[row, -length:], alone.log_probs[0, -length:], 1e-5, f"row {row}")


def test_the_prompt_behind_bos_is_scored_as_the_loss_says():
    _, fast = with_heads("llama", placement="after_bos")
    batch = make_batch(side="right", labels="everywhere")
    batch["input_ids"][:, 0] = batch["labels"][:, 0] = 1
    base, plain = fast.get_base_model(), fast(**batch).loss
    base.__dict__.pop("forward")
    add_fused_lm_head(base)
    got = fast(**batch, fused_lm_head=True)
    assert got.log_probs.shape[1] == batch["labels"].shape[1] + 4 - 1
    assert float(got.loss) == pytest.approx(float(plain), rel=1e-5)


def test_without_being_asked_the_head_changes_nothing():
    stock, fast = with_heads("llama")
    batch = make_batch(labels="everywhere")
    expected = stock(**batch)
    for more in ({}, {"fused_lm_head": False}):
        got = fast(**batch, **more)
        assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    ids = {"input_ids": batch["input_ids"][:1, :3]}
    generated = [model.generate(**ids, max_new_tokens=3, do_sample=False) for model in (stock, fast)]
    assert torch.equal(*generated)


def test_two_trainers_may_put_their_heads_on_one_model():
    _, fast = with_heads("llama")
    add_fused_lm_head(fast.get_base_model())
    assert scores_tokens(fast.get_base_model())
    assert "TRL's fused head" in str(softprompt.explain(fast))


def test_a_head_around_a_foreign_forward_stays_on_the_forward_of_peft():
    stock, fast = pair(prompted("llama", torch.float32))
    softprompt.patch(fast)
    base = fast.get_base_model()
    own = base.forward
    base.forward = lambda *args, **kwargs: own(*args, **kwargs)
    for model in (stock, fast):
        add_fused_lm_head(model.get_base_model())
    batch = make_batch(labels="everywhere")
    expected = stock(**batch, fused_lm_head=True)
    with pytest.warns(UserWarning, match="hooks or a replaced forward"):
        got = fast(**batch, fused_lm_head=True)
    assert torch.equal(got.log_probs, expected.log_probs)
    assert not scores_tokens(base)


def test_the_head_without_labels_stays_on_the_forward_of_peft():
    _, fast = with_heads("llama")
    with pytest.raises(softprompt.UnsupportedModelError, match="does not serve: fused_lm_head"):
        fast(**make_batch(labels=None), use_cache=False, fused_lm_head=True)
