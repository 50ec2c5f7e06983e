"""What a self-check on two short rows cannot see: lengths, threads, hooks, and who takes the lazy logits."""

import threading
import warnings

import pytest
import torch
from parity import assert_same_step, make_batch, prompt_of, relative_error, step
from peft import PeftModelForCausalLM
from tiny_models import build, pair, prompted, with_prompt

import softprompt

BATCH = make_batch(side="left", labels="everywhere")
LONG = make_batch((30, 12, 21, 9, 26), "right", "everywhere", width=36)


def test_gpt_neo_with_a_window_longer_than_the_probe_gives_the_numbers_of_peft():
    stock, fast = pair(prompted("gpt_neo", window_size=24))
    softprompt.patch(fast)
    assert softprompt.explain(fast).route == "packed"
    assert_same_step(fast, stock, LONG)


@pytest.mark.filterwarnings("ignore:softprompt")
def test_gpt_neo_with_a_forward_of_its_own_stays_padded():
    stock, fast = pair(prompted("gpt_neo", window_size=24))
    for model in (stock, fast):
        attention = model.get_base_model().transformer.h[1].attn.attention
        attention.forward = type(attention).forward.__get__(attention)
    softprompt.patch(fast)
    report = softprompt.explain(fast)
    assert report.route == "padded"
    assert "place in the row" in report.reason
    assert "replaced on the instance" in report.reason
    assert_same_step(fast, stock, LONG)


@pytest.mark.parametrize("original", [16, 64])
def test_a_rotary_embedding_that_changes_with_the_length_gives_the_numbers_of_peft(original):
    rope = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": original,
    }
    stock, fast = pair(prompted("llama", rope_parameters=rope, max_position_embeddings=original))
    softprompt.patch(fast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected, got = step(stock, LONG), step(fast, LONG)
    assert relative_error(got.loss, expected.loss) < 2e-6
    said = [str(w.message) for w in caught if "rotary embedding changes beyond 16" in str(w.message)]
    assert len(said) == (1 if original == 16 else 0)


def test_threads_that_share_a_model_get_the_numbers_of_one():
    model = softprompt.patch(prompted("llama"))
    expected = float(model(**BATCH).loss)
    losses, errors = [], []

    def work():
        try:
            with torch.no_grad():
                losses.extend(float(model(**BATCH).loss) for _ in range(20))
        except Exception as error:  # a thread's exception would be lost
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(losses) == 60
    assert max(abs(loss - expected) for loss in losses) < 1e-6
    assert model.get_base_model().config._attn_implementation == "sdpa"


class SquareMean(torch.autograd.Function):
    """Takes tensors below Python's tensor functions, as DDP and checkpointing do."""

    @staticmethod
    def forward(ctx, logits, mask):
        ctx.save_for_backward(logits, mask)
        return (logits[:, -mask.shape[1] :] * mask).square().mean()

    @staticmethod
    def backward(ctx, grad):
        logits, mask = ctx.saved_tensors
        out = torch.zeros_like(logits)
        text = logits[:, -mask.shape[1] :]
        out[:, -mask.shape[1] :] = grad * 2 * text * mask / text.numel()
        return out, None


@pytest.mark.parametrize("with_loss", [True, False])
def test_a_function_below_pythons_tensors_gets_the_gradient_of_lazy_logits(with_loss):
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast)
    mask = BATCH["attention_mask"][:, :, None].double()
    grads = []
    for model in (stock, fast):
        out = model(**BATCH)
        loss = SquareMean.apply(out.logits, mask)
        if with_loss:
            loss = loss + out.loss
        grads.append(torch.autograd.grad(loss, prompt_of(model))[0])
    assert relative_error(grads[1], grads[0]) < 2e-6


def test_lazy_logits_say_whether_they_have_a_gradient_without_being_computed():
    model = softprompt.patch(prompted("llama"))
    logits = model(**BATCH).logits
    assert logits.requires_grad
    assert logits.grad_fn is not None
    assert logits.float().requires_grad
    assert not logits.detach().requires_grad
    with torch.no_grad():
        assert not model(**BATCH).logits.requires_grad
    assert not logits.is_materialized


@pytest.mark.filterwarnings("ignore:softprompt")
def test_a_hook_on_the_language_model_itself_acts():
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast)
    for model in (stock, fast):
        model.get_base_model().register_forward_hook(
            lambda module, args, output: type(output)(loss=output.loss * 3, logits=output.logits)
        )
    assert relative_error(fast(**BATCH).loss, stock(**BATCH).loss) < 1e-12


class Tripled(PeftModelForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.loss = out.loss * 3
        return out


def test_a_subclass_with_a_forward_of_its_own_is_left_alone():
    stock, fast = pair(prompted("llama"))
    stock.__class__ = fast.__class__ = Tripled
    with pytest.warns(UserWarning, match="Tripled has a forward of its own"):
        softprompt.patch(fast)
    assert torch.equal(fast(**BATCH).loss, stock(**BATCH).loss)


@pytest.mark.filterwarnings("ignore:softprompt")
def test_a_router_loss_that_is_switched_on_after_patching_counts():
    stock, fast = pair(with_prompt(build("gpt_oss")))
    softprompt.patch(fast)
    for model in (stock, fast):
        model.get_base_model().config.output_router_logits = True
    assert relative_error(fast(**BATCH).loss, stock(**BATCH).loss) < 2e-6


def test_patched_inside_of_patch_puts_the_options_and_the_class_back():
    model = softprompt.patch(prompted("llama"))
    patched_class = type(model)
    with softprompt.patched(model, positions="compact"):
        softprompt.unpatch(model)
    assert type(model) is patched_class
    assert softprompt.explain(model).patched


@pytest.mark.filterwarnings("ignore:softprompt")
def test_a_call_that_falls_back_has_the_same_input_errors():
    model = softprompt.patch(prompted("llama"))
    ids = BATCH["input_ids"]
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(input_ids=ids, attention_mask=torch.ones(ids.shape[0], ids.shape[1] + 4))
    wrong = ids.clone()
    wrong[1, 2] = 97
    with pytest.raises(IndexError, match=r"input_ids\[1, 2\] = 97"):
        model(input_ids=wrong)
    with pytest.raises(ValueError, match="attention_mask must be a tensor, got list"):
        model(input_ids=ids, attention_mask=BATCH["attention_mask"].tolist(), labels=ids)


def test_a_head_that_is_not_one_module_takes_the_models_own():
    stock = prompted("llama")
    head = stock.get_base_model().lm_head
    stock.get_base_model().lm_head = torch.nn.Sequential(head)
    stock, fast = pair(stock)
    softprompt.patch(fast)
    assert_same_step(fast, stock, BATCH)
