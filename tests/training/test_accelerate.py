"""The loop that accelerate's users write, on a patched model as on PEFT's."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from parity import assert_close, make_batch, prompt_of
from tiny_models import pair, prompted

import softprompt

BATCHES = [make_batch((7, 3, 5), "left", "everywhere", seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def start():
    return prompted("llama", torch.float32)


@pytest.fixture
def accelerator():
    """Makes an Accelerator; its settings are of the process."""

    def make(**options):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return Accelerator(cpu=True, **options)

    yield make
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def loop(accelerator, model, prepared=lambda model: model):
    """The losses of a run, its optimizer and its model behind `prepare`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    prepared(model)
    losses = []
    for batch in BATCHES:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model


def patch(model):
    return softprompt.patch(model, on_unsupported="error")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_model_may_be_patched_before_and_after_prepare(start, accelerator, when, options):
    stock, fast = pair(start)
    expected, _ = loop(accelerator(**options), stock)
    if when == "before":
        patch(fast)
    got, _ = loop(accelerator(**options), fast, patch if when == "after" else lambda model: model)
    assert got == pytest.approx(expected, rel=1e-5)
    assert_close(prompt_of(fast), prompt_of(stock), 1e-4, "prompt")


def test_under_bf16_the_patch_comes_before_prepare(start, accelerator):
    stock, fast = pair(start)
    expected, _ = loop(accelerator(mixed_precision="bf16"), stock)
    got, _ = loop(accelerator(mixed_precision="bf16"), patch(fast))
    assert got == pytest.approx(expected, rel=2e-2)


def test_under_bf16_a_patch_behind_prepare_is_refused_by_name(start, accelerator):
    model = accelerator(mixed_precision="bf16").prepare(pair(start)[0])
    with pytest.raises(softprompt.UnsupportedModelError, match=r"accelerate's prepare does that.*before"):
        patch(model)
    with pytest.warns(UserWarning, match=r"accelerate's prepare does that.*before"):
        softprompt.patch(model)
    assert "accelerate's prepare does that" in softprompt.explain(model).reason


@pytest.mark.parametrize("keep", [True, False])
def test_an_unwrapped_model_is_patched_still_and_can_be_unpatched(start, accelerator, keep):
    stock, fast = pair(start)
    one = accelerator(mixed_precision="bf16")
    _, prepared = loop(one, patch(fast))
    model = one.unwrap_model(prepared, keep_fp32_wrapper=keep)
    assert model is fast
    assert softprompt.explain(model).patched
    if keep:
        return
    stock.load_state_dict(model.state_dict())
    expected = stock(**BATCHES[0])
    assert float(model(**BATCHES[0]).loss) == pytest.approx(float(expected.loss), rel=1e-5)
    softprompt.unpatch(model)
    assert float(model(**BATCHES[0]).loss) == float(expected.loss)


def test_a_loop_under_fp16_autocast_with_a_scaler_is_that_of_peft(start):
    curves = []
    for number, model in enumerate(pair(start)):
        if number:
            patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        losses = []
        for batch in BATCHES:
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        curves.append(losses)
        assert scaler.get_scale() == 256.0
    assert curves[0][-1] != curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)
