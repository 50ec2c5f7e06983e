"""P-tuning and multitask prompt tuning take the same route, and give PEFT's numbers for every parameter."""

import warnings

import pytest
import torch
from encoder_models import ENCODERS, TASKS, config_of, encoded, spread
from generating import tokens
from marks import slow_unless
from parity import assert_close, assert_same_step, make_batch, relative_error, step
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import build, pair

import softprompt
from softprompt.generation.stock import PEFT_KNOWS_CACHE

TASK_IDS = torch.tensor([2, 0, 2])


def extra(kind, task_ids=TASK_IDS):
    return {"task_ids": task_ids} if kind == "multitask" else {}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(
    "name", slow_unless(["llama", "mamba"], ["llama", "bloom", "gpt2", "opt", "gemma2", "mamba"])
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_logits_and_all_gradients_are_those_of_peft(kind, name, side):
    stock, fast = pair(encoded(kind, name))
    softprompt.patch(fast, on_unsupported="error")
    batch = make_batch(side=side, labels="everywhere")
    assert_same_step(fast, stock, batch, **extra(kind))
    grads = step(fast, batch, **extra(kind)).grads
    trainable = [n for n, p in fast.named_parameters() if p.requires_grad]
    assert set(grads) == set(trainable)
    assert len(grads) == {"mlp": 7, "lstm": 21, "multitask": 3}[kind]
    assert all(grad.norm() > 0 for grad in grads.values())


def test_rows_of_one_task_share_one_prompt():
    stock, fast = pair(encoded("multitask"))
    softprompt.patch(fast, on_unsupported="error")
    batch = make_batch(labels="everywhere")
    for task_ids in (torch.tensor([1, 1, 1]), torch.tensor([1]), torch.tensor([0, 1, 2])):
        assert_same_step(fast, stock, batch, task_ids=task_ids)
    loss = step(fast, batch, task_ids=[0, 1, 2]).loss
    assert_close(loss, step(stock, batch, task_ids=torch.tensor([0, 1, 2])).loss, 2e-6, "loss")


def test_rows_may_differ_in_adapter_and_task():
    stock = encoded("multitask")
    stock.add_adapter("longer", config_of(stock.get_base_model(), "multitask", 6))
    spread(stock)
    stock, fast = pair(stock)
    softprompt.patch(fast, on_unsupported="error")
    batch = make_batch(side="left", labels="everywhere")
    names, tasks = ["longer", "default", "longer"], torch.tensor([0, 2, 1])
    stock.zero_grad(set_to_none=True)
    loss = 0
    for row, name in enumerate(names):
        stock.set_adapter(name)
        own = {key: value[row : row + 1] for key, value in batch.items()}
        output = stock(**own, task_ids=tasks[row : row + 1], num_items_in_batch=5)
        output.loss.backward()
        loss = loss + output.loss.detach()
    got = step(fast, batch, adapter_names=names, task_ids=tasks, num_items_in_batch=5)
    assert_close(got.loss, loss, 2e-6, "loss")
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            assert_close(got.grads[name], parameter.grad, 2e-5, name)


@pytest.mark.parametrize("kind", ENCODERS)
def test_training_follows_peft_step_by_step(kind):
    stock, fast = pair(encoded(kind, dtype=torch.float32))
    softprompt.patch(fast, on_unsupported="error")
    curves = []
    for model in (stock, fast):
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        model.train()
        losses = []
        for number in range(8):
            loss = step_loss(model, optimizer, make_batch(labels="everywhere", seed=number % 2), extra(kind))
            losses.append(loss)
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=2e-4)
    assert curves[0][-1] < curves[0][1] - 0.05


def step_loss(model, optimizer, batch, options):
    loss = model(**batch, **options).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("kind", ENCODERS)
def test_recorded_steps_reach_the_parameters_of_the_encoder(kind, tape):
    stock, fast = pair(encoded(kind))
    softprompt.patch(fast, on_unsupported="error")
    for seed in range(4):
        batch = make_batch(labels="everywhere", seed=seed)
        tasks = torch.tensor([seed % TASKS, (seed + 1) % TASKS, seed % TASKS])
        assert_same_step(fast, stock, batch, **extra(kind, tasks))
        for model in (stock, fast):
            with torch.no_grad():
                for parameter in model.prompt_encoder.parameters():
                    parameter.add_(0.1)
    assert fast._softprompt.runner.graphs.statistics.replayed >= 3


@pytest.mark.parametrize("kind", ENCODERS)
def test_adapter_files_go_both_ways(kind, tmp_path):
    trained = encoded(kind, dtype=torch.float32)
    softprompt.patch(trained, on_unsupported="error").save_pretrained(tmp_path)
    loaded = [PeftModel.from_pretrained(build("llama", torch.float32), str(tmp_path)) for _ in range(2)]
    softprompt.patch(loaded[1], on_unsupported="error")
    batch = make_batch(side="left", labels="everywhere")
    assert_same_step(loaded[1], loaded[0], batch, bound=3e-5, **extra(kind))
    before, after = (step(model, batch, **extra(kind)).loss for model in (trained, loaded[1]))
    assert_close(after, before, 1e-5, "loss after loading")


@pytest.mark.parametrize("kind", ENCODERS)
def test_generate_gives_the_tokens_of_peft(kind):
    stock, fast = pair(encoded(kind, dtype=torch.float32))
    softprompt.patch(fast, on_unsupported="fallback")
    batch = make_batch(side="left", labels=None)
    options = {"max_new_tokens": 5, "do_sample": False, **extra(kind)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(tokens(fast, batch, **options), tokens(stock, batch, **options))


def test_dropout_in_the_encoder_is_drawn_as_peft_draws_it():
    model = encoded("lstm")
    model.prompt_encoder["default"].lstm_head.dropout = 0.4
    stock, fast = pair(model)
    softprompt.patch(fast, on_unsupported="error")
    batch = make_batch(labels="everywhere")
    losses = []
    for model in (stock, fast):
        model.train()
        torch.manual_seed(8)
        losses.append(torch.stack([model(**batch).loss.detach() for _ in range(3)]))
    assert losses[0].std() > 1e-4
    assert relative_error(losses[1], losses[0]) < 2e-6


@pytest.mark.parametrize(
    "task_ids, error, words",
    [
        (None, ValueError, r"MULTITASK_PROMPT_TUNING and needs task_ids.*3 rows; task_ids cannot be None"),
        (torch.tensor([0, 1]), ValueError, r"3 rows; got task_ids of shape \[2\]"),
        (torch.tensor([[0, 1, 2]]), ValueError, r"shape \[1, 3\]"),
        (torch.tensor([0.0, 1.0, 2.0]), ValueError, "torch.float32, expected integers"),
        (["a", "b", "c"], ValueError, r"got task_ids=\['a', 'b', 'c'\], expected integers"),
        (torch.tensor([0, 3, 1]), IndexError, r"task_ids\[1\] = 3 is outside the tasks 0 .. 2 of 'default'"),
        (torch.tensor([0, 1, -1]), IndexError, r"task_ids\[2\] = -1 is outside"),
    ],
)
def test_wrong_tasks_are_refused(task_ids, error, words):
    fast = softprompt.patch(encoded("multitask"), on_unsupported="error")
    with pytest.raises(error, match=words):
        fast(**make_batch(labels="everywhere"), task_ids=task_ids)


@pytest.mark.parametrize("tasks", [[0, 2, 1], (0, 2, 1), [1], 1], ids=str)
def test_tasks_may_be_a_list_wherever_peft_serves_the_call(tasks):
    stock, fast = pair(encoded("multitask"))
    softprompt.patch(fast)
    batch = make_batch(labels="everywhere")
    expected = stock(**batch, task_ids=torch.tensor(tasks)).loss.detach()
    for arguments in ({}, {"output_hidden_states": True}):
        assert_close(fast(**batch, task_ids=tasks, **arguments).loss.detach(), expected, 2e-6, "loss")
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 3, "do_sample": False}
    wanted = stock.generate(**texts, task_ids=torch.tensor(tasks), **options, use_cache=PEFT_KNOWS_CACHE)
    assert torch.equal(fast.generate(**texts, task_ids=tasks, **options), wanted)


def test_tasks_are_ignored_by_adapters_without_tasks():
    stock, fast = pair(encoded("mlp"))
    softprompt.patch(fast, on_unsupported="error")
    assert_same_step(fast, stock, make_batch(labels="everywhere"), task_ids=torch.tensor([7, 8, 9]))


def test_explain_names_the_type_and_the_tasks():
    fast = softprompt.patch(encoded("multitask"))
    assert "MULTITASK_PROMPT_TUNING), one prompt for each of 3 tasks" in str(softprompt.explain(fast))
    assert softprompt.explain(fast).route == "packed"
    assert "4 virtual tokens of 'default' (P_TUNING)" in str(softprompt.explain(encoded("mlp")))


def test_other_types_keep_the_forward_of_peft():
    base = build("llama", torch.float32)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = softprompt.patch(get_peft_model(base, config))
    with pytest.warns(UserWarning, match="PREFIX_TUNING; PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING"):
        model(**make_batch(labels="everywhere"))
