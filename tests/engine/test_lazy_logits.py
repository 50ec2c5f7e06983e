"""Logits that are computed when something first looks at them, and never otherwise."""

import copy
import functools
import io

import numpy as np
import pytest
import torch
from accelerate.utils import convert_to_fp32
from parity import assert_close, make_batch, prompt_of, real_columns
from tiny_models import pair, prompted
from transformers import Trainer, TrainingArguments

import softprompt
from softprompt.engine.lazy_logits import LazyLogits, with_gradient

BATCH = make_batch(side="right", labels="everywhere", width=7)  # the longest text fills its row
REAL = real_columns(BATCH, 4)


def make_lazy(requires_grad=False, calls=None):
    value = torch.arange(24.0).view(2, 3, 4).requires_grad_(requires_grad)

    def make():
        if calls is not None:
            calls.append(1)
        return value * 1

    return with_gradient(value, lambda source: source * 1, make, (2, 3, 4), torch.float32), value


@pytest.fixture(params=["llama", "bloom", "opt", "mamba"])
def models(request):
    stock, fast = pair(prompted(request.param))
    return stock, softprompt.patch(fast, on_unsupported="error")


def test_shape_dtype_and_device_are_known_without_the_values(models):
    stock, fast = models
    expected, logits = stock(**BATCH).logits, fast(**BATCH).logits
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == logits.size() == expected.shape
    assert (logits.dtype, logits.device, logits.layout) == (expected.dtype, expected.device, expected.layout)
    assert logits.size(-1) == expected.size(-1)
    assert (logits.ndim, logits.dim(), logits.numel(), len(logits)) == (3, 3, expected.numel(), 3)
    assert logits.is_floating_point()
    assert logits.requires_grad == expected.requires_grad
    assert not logits.is_cuda
    assert not logits.is_materialized
    with torch.no_grad():
        assert not fast(**BATCH).logits.requires_grad


USES = {
    "argmax": lambda x: x.argmax(-1),
    "torch.argmax": lambda x: torch.argmax(x, dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: torch.nn.functional.log_softmax(x, -1),
    "index": lambda x: x[:, -1],
    "ellipsis": lambda x: x[..., :-1, :].contiguous(),
    "mask": lambda x: x[torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % 2 == 0],
    "numpy": lambda x: torch.from_numpy(x.detach().cpu().numpy()),
    "asarray": lambda x: torch.from_numpy(np.asarray(x.detach())),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, torch.zeros_like(x)]),
    "rows": lambda x: torch.stack(list(x)),
    "arithmetic": lambda x: 1 - x / 2 + x,
    "comparison": lambda x: (x > 0).double(),
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "cast of a cast": lambda x: x.float().double().bfloat16(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "view": lambda x: x.view(-1, x.size(-1)),
    "matmul": lambda x: x @ torch.ones(x.shape[-1], 2, dtype=x.dtype),
    "topk": lambda x: x.topk(3).indices,
    "convert_to_fp32": lambda x: convert_to_fp32({"logits": (x.bfloat16(),)})["logits"][0],
    "clone": lambda x: x.clone(),
    "out": lambda x: torch.exp(x, out=torch.empty(x.shape, dtype=x.dtype)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_sees_the_values(use):
    lazy, value = make_lazy()
    expected, got = use(value), use(lazy)
    assert got.dtype == expected.dtype
    assert torch.equal(got + 0, expected)


@functools.cache
def llamas():
    stock, fast = pair(prompted("llama"))
    return stock, softprompt.patch(fast)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_sees_the_logits_of_peft(use):
    stock, fast = llamas()
    row = {key: value[:1] for key, value in BATCH.items()}  # the row without pads
    with torch.no_grad():
        expected, got = use(stock(**row).logits), use(fast(**row).logits)
    assert got.dtype == expected.dtype
    if expected.is_floating_point():
        assert_close(got, expected, 1e-2 if expected.dtype == torch.bfloat16 else 2e-5, "result")
    else:
        assert torch.equal(got, expected)


def test_values_are_made_once():
    calls = []
    lazy, value = make_lazy(calls=calls)
    assert calls == []
    lazy.argmax(-1)
    lazy[0]
    assert torch.equal(lazy.softmax(-1), value.softmax(-1))
    assert calls == [1]
    assert lazy.is_materialized


@pytest.mark.parametrize("cast", ["float", "bfloat16", "detach", "double", "half"])
def test_casts_and_detach_stay_lazy_and_share_the_values(cast):
    calls = []
    lazy, value = make_lazy(requires_grad=True, calls=calls)
    twice = getattr(getattr(lazy, cast)(), cast)()
    assert isinstance(twice, LazyLogits)
    assert calls == []
    assert twice.requires_grad == (cast != "detach")
    assert twice.dtype == getattr(value, cast)().dtype
    assert torch.equal(twice + 0, getattr(value, cast)())
    lazy.sum()
    assert calls == [1]


@pytest.mark.parametrize("grad", [True, False])
def test_a_clone_stays_lazy_and_has_values_of_its_own(grad):
    lazy, source = make_lazy(requires_grad=True)
    with torch.set_grad_enabled(grad):
        clone = lazy.clone()
        assert not clone.is_materialized
        assert clone.requires_grad == grad
        clone += 1
    assert torch.equal(clone.detach() + 0, source.detach() + 1)
    assert torch.equal(lazy.detach() + 0, source)
    if grad:
        (2 * clone).sum().backward()
        assert torch.equal(source.grad, torch.full_like(source, 2))


def test_a_hook_on_the_gradient_keeps_them_lazy_and_is_called():
    lazy, source = make_lazy(requires_grad=True)
    seen = []
    lazy.register_hook(seen.append)
    assert not lazy.is_materialized
    (3 * lazy).sum().backward()
    assert torch.equal(seen[0], torch.full_like(source, 3))
    assert torch.equal(source.grad, torch.full_like(source, 3))


def test_the_fp32_conversion_of_accelerate_stays_lazy():
    stock, fast = pair(prompted("llama", torch.bfloat16))
    softprompt.patch(fast)
    output = convert_to_fp32(fast(**BATCH))
    assert type(output) is type(stock(**BATCH))
    assert isinstance(output.logits, LazyLogits)
    assert not output.logits.is_materialized
    assert output.logits.dtype == output.loss.dtype == torch.float32
    assert_close(output.logits[REAL], stock(**BATCH).logits[REAL], 4e-2, "logits")


def test_tuples_and_dictionaries_hold_lazy_logits(models):
    _, fast = models
    output = fast(**BATCH)
    for logits in (output.logits, output["logits"], output[1], output.to_tuple()[1], dict(output)["logits"]):
        assert logits is output.logits
    assert fast(**BATCH, return_dict=False)[1].shape == output.logits.shape
    assert not output.logits.is_materialized


def test_the_values_are_those_of_the_forward_also_after_an_optimizer_step(models):
    stock, fast = models
    early, late = fast(**BATCH), fast(**BATCH)
    before = early.logits.detach() + 0
    expected = stock(**BATCH).logits
    optimizer = torch.optim.SGD([prompt_of(fast)], lr=10.0)
    late.loss.backward()
    optimizer.step()
    assert torch.equal(late.logits.detach() + 0, before)
    assert_close(before[REAL], expected.detach()[REAL], 2e-5, "logits")
    assert not torch.allclose(fast(**BATCH).logits[REAL], before[REAL], rtol=1e-2)


def own_loss(logits, labels):
    """A user's own loss over all text tokens, that of the first one included."""
    predicted = logits[:, -labels.shape[1] - 1 : -1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(predicted.double(), labels.flatten(), label_smoothing=0.3)


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_loss_of_the_user_on_the_logits_gives_the_prompt_its_gradient(models, with_labels):
    batch = dict(BATCH) if with_labels else {**BATCH, "labels": None, "use_cache": False}
    grads = []
    for model in models:
        model.train()
        model.zero_grad()
        output = model(**batch)
        loss = own_loss(output.logits, BATCH["labels"])
        if with_labels:
            loss = 2 * loss + output.loss
        loss.backward()
        grads.append(prompt_of(model).grad)
    assert grads[0].norm() > 0
    assert_close(grads[1], grads[0], 2e-5, "prompt gradient")


def test_the_logits_of_a_checkpointed_model_reach_the_prompt():
    stock, fast = pair(prompted("llama"))
    softprompt.patch(fast)
    for model in (stock, fast):
        model.get_base_model().gradient_checkpointing_enable()
        model.train()
        own_loss(model(**BATCH, use_cache=False).logits, BATCH["labels"]).backward()
    assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 2e-5, "prompt gradient")


def test_autocast_is_that_of_the_forward():
    stock, fast = pair(prompted("llama", torch.float32))
    softprompt.patch(fast)
    with torch.autocast("cpu", torch.bfloat16):
        inside, expected = fast(**BATCH).logits, stock(**BATCH).logits
    assert inside.dtype == expected.dtype == torch.bfloat16
    assert_close(inside[REAL], expected[REAL], 4e-2, "logits")
    outside = fast(**BATCH).logits
    with torch.autocast("cpu", torch.bfloat16):
        value = outside + 0
    assert value.dtype == torch.float32
    assert_close(value[REAL], stock(**BATCH).logits[REAL], 3e-4, "logits")


def test_no_grad_is_that_of_the_forward(models):
    _, fast = models
    with torch.no_grad():
        frozen = fast(**BATCH).logits
    assert not (frozen + 0).requires_grad
    live = fast(**BATCH).logits
    with torch.no_grad():
        live.argmax(-1)
    own_loss(live, BATCH["labels"]).backward()
    assert prompt_of(fast).grad.norm() > 0


def test_copies_and_files_hold_plain_values(models):
    _, fast = models
    with torch.no_grad():
        logits = fast(**BATCH).logits
    twin = copy.deepcopy(logits)
    buffer = io.BytesIO()
    torch.save({"logits": fast(**BATCH).logits.detach()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)["logits"]
    for copied in (twin, loaded):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, logits + 0)


def test_printing_shows_the_values():
    lazy, value = make_lazy()
    assert repr(lazy) == repr(value * 1)


def test_writing_into_the_logits_changes_them():
    lazy, value = make_lazy()
    lazy[0, 0, 0] = 50
    lazy.add_(1)
    assert float(lazy[0, 0, 0]) == 51
    assert float(value[0, 0, 0]) == 0


class Rows(torch.utils.data.Dataset):
    """The rows of one batch."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {name: value[index] for name, value in BATCH.items()}


def arguments(path, **options):
    return TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=3,
        disable_tqdm=True,
        **options,
    )


def test_training_never_makes_them(models, tmp_path, monkeypatch):
    _, fast = models
    monkeypatch.setattr(LazyLogits, "materialize", lambda self: pytest.fail("the logits were computed"))
    for _ in range(2):
        step_loss = fast.train()(**BATCH).loss
        step_loss.backward()
    Trainer(fast, arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=Rows()).train()
    with pytest.raises(pytest.fail.Exception):
        fast(**BATCH).logits.argmax(-1)


def test_the_evaluation_of_trainer_gets_the_predictions_of_peft(models, tmp_path):
    stock, fast = models
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {}

    metrics = []
    for model in (stock, fast):
        trainer = Trainer(
            model,
            arguments(tmp_path, per_device_eval_batch_size=2),
            eval_dataset=Rows(),
            compute_metrics=compute_metrics,
        )
        metrics.append(trainer.evaluate(ignore_keys=["past_key_values", "cache_params"]))
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-5)
    expected, got = (prediction.predictions for prediction in seen)
    assert got.shape == expected.shape == (3, 11, 97)
    assert (seen[1].label_ids == seen[0].label_ids).all()
    labelled = torch.cat([torch.zeros(3, 3, dtype=torch.bool), BATCH["labels"] != -100], 1).numpy()
    assert (got[:, :-1].argmax(-1)[labelled] == expected[:, :-1].argmax(-1)[labelled]).all()
    assert_close(torch.tensor(got)[REAL], torch.tensor(expected)[REAL], 2e-5, "logits")
