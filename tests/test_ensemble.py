"""Several prompts on one batch stream against each of them alone."""

import copy

import pytest
import torch
import transformers
from parity import assert_close, make_batch, prompt_of
from peft import PromptTuningConfig, get_peft_model
from tiny_models import build, prompt_config

import softprompt
from softprompt import ensemble
from softprompt.engine import plan_for, runner

PACKED_NAMES = ["bloom", "llama", "gpt2", "gemma2"]


def created(name, size=3, lengths=None, dtype=torch.float64):
    base = build(name, dtype)
    lengths = [4] * size if lengths is None else lengths
    model = ensemble.create(base, [prompt_config(base, length) for length in lengths])
    model.prompt_encoder.to(dtype)
    return model


def alone_of(model, name):
    """A model of its own with one of the prompts."""
    base = copy.deepcopy(model.get_base_model())
    single = get_peft_model(base, copy.deepcopy(model.peft_config[name]))
    single.prompt_encoder.to(next(base.parameters()).dtype)
    with torch.no_grad():
        prompt_of(single).copy_(prompt_of(model, name))
    return single


def batches(count, side="left"):
    return [make_batch((7, 3, 5), side, "answer", seed=seed) for seed in range(count)]


@pytest.mark.parametrize("name", PACKED_NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_and_gradients_are_those_of_each_prompt_alone(name, side):
    model = created(name, lengths=[4, 2, 4])
    batch = make_batch((7, 3, 5), side, "everywhere")
    losses = ensemble.losses(model, **batch)
    losses.total.backward()
    for number, adapter in enumerate(model.peft_config):
        single = alone_of(model, adapter)
        loss = single(**batch).loss
        loss.backward()
        assert_close(losses.each[number], loss.detach(), 2e-6, f"loss of {adapter}")
        assert_close(prompt_of(model, adapter).grad, prompt_of(single).grad, 2e-5, f"gradient of {adapter}")


@pytest.mark.parametrize("name", PACKED_NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_with_rows_of_their_own_are_those_of_each_prompt_alone(name, side):
    model = created(name, lengths=[4, 2, 4])
    batches = [make_batch(lengths, side, "everywhere") for lengths in ((7, 3), (5, 7), (7, 6))]
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    losses = ensemble.losses(model, **joined, own_rows=True)
    losses.total.backward()
    for number, adapter in enumerate(model.peft_config):
        single = alone_of(model, adapter)
        loss = single(**batches[number]).loss
        loss.backward()
        assert_close(losses.each[number], loss.detach(), 2e-6, f"loss of {adapter}")
        assert_close(prompt_of(model, adapter).grad, prompt_of(single).grad, 2e-5, f"gradient of {adapter}")


def adafactor(parameters, lr):
    return transformers.Adafactor(parameters, lr=lr, scale_parameter=False, relative_step=False)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, adafactor])
def test_learning_curves_are_those_of_separate_runs(optimizer):
    model = created("bloom", size=3, dtype=torch.float32)
    singles = [alone_of(model, name) for name in model.peft_config]
    ours = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.05)
    theirs = [optimizer([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in singles]
    first, last = None, None
    for batch in batches(25):
        losses = ensemble.losses(model, **batch)
        losses.total.backward()
        ours.step()
        ours.zero_grad()
        separate = []
        for single, their in zip(singles, theirs, strict=True):
            loss = single(**batch).loss
            loss.backward()
            their.step()
            their.zero_grad()
            separate.append(loss.detach())
        torch.testing.assert_close(losses.each, torch.stack(separate), rtol=1e-4, atol=1e-4)
        first, last = first or losses.each.sum(), losses.each.sum()
    assert last < 0.9 * first


@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradients_accumulate_to_those_of_the_whole_batch(as_tensor):
    model = created("llama", size=2)
    parts = [make_batch((7, 3, 5), "left", "everywhere"), make_batch((2, 6, 1), "left", "everywhere")]
    items = sum(int((part["labels"] != -100).sum()) for part in parts)
    each, shares = 0, []
    for part in parts:
        shares.append(int((part["labels"] != -100).sum()) / items)
        losses = ensemble.losses(
            model, **part, num_items_in_batch=torch.tensor([items]) if as_tensor else items
        )
        losses.total.backward()
        each = each + losses.each
    got = [prompt_of(model, name).grad.clone() for name in model.peft_config]
    model.zero_grad()
    alone = [ensemble.losses(model, **part) for part in parts]
    (shares[0] * alone[0].total + shares[1] * alone[1].total).backward()
    assert_close(each, shares[0] * alone[0].each + shares[1] * alone[1].each, 1e-9, "losses")
    for ours, name in zip(got, model.peft_config, strict=True):
        assert_close(ours, prompt_of(model, name).grad, 1e-9, f"gradient of {name}")


def test_a_batch_without_labels_says_so_and_moves_no_prompt():
    model, batch = created("llama", size=2), make_batch((7, 3), "left", "answer")
    with pytest.warns(UserWarning, match="every label of this batch is -100; the loss is 0"):
        losses = ensemble.losses(model, **batch | {"labels": torch.full_like(batch["labels"], -100)})
    losses.total.backward()
    assert losses.each.tolist() == [0, 0]
    assert not any(prompt_of(model, name).grad.any() for name in model.peft_config)


def test_prompts_of_several_lengths_do_not_share_a_rotary_embedding_that_depends_on_them():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 12}
    base = build("llama", rope_parameters=rope, max_position_embeddings=12)
    model = ensemble.create(base, [prompt_config(base, length) for length in (2, 8)])
    with pytest.raises(softprompt.UnsupportedModelError, match=r"changes beyond 12, for all prompts at once"):
        ensemble.losses(model, **make_batch((7, 3), "left", "answer"), positions="compact")


def test_the_patch_decides_the_positions():
    model = created("llama", size=2)
    batch = make_batch((7, 3, 5), "left", "answer")
    padded, compact = (
        ensemble.losses(model, **batch, positions=positions).each for positions in ("padded", "compact")
    )
    assert (padded - compact).abs().min() > 1e-4
    softprompt.patch(model, positions="compact")
    assert torch.equal(ensemble.losses(model, **batch).each, compact)


def test_a_frozen_head_that_is_called_gives_the_same_losses(monkeypatch):
    model = created("granite", size=2)
    batch = make_batch((7, 3, 5), "left", "answer")
    fused = ensemble.losses(model, **batch)
    plan = plan_for(model.get_base_model())
    monkeypatch.setattr(runner, "plan_for", lambda _, **options: with_its_own_head(plan))
    assert_close(ensemble.losses(model, **batch).each, fused.each, 1e-9, "losses")


def with_its_own_head(plan):
    from dataclasses import replace

    assert plan.fused_head
    return replace(plan, fused_head=False)


@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11)], ids=str)
@pytest.mark.parametrize("own_rows", [False, True])
def test_a_recorded_step_trains_all_prompts(tape, num_items, own_rows):
    model = created("llama", size=3)
    batch = make_batch((7, 3, 5), "left", "answer")  # with another number of labels in each row
    options = {"num_items_in_batch": num_items, "own_rows": own_rows}
    softprompt.patch(model, cuda_graphs=False)
    expected = ensemble.losses(model, **batch, **options)
    grads = torch.autograd.grad(expected.total, [prompt_of(model, name) for name in model.peft_config])
    softprompt.patch(model)
    for _ in range(3):
        recorded = ensemble.losses(model, **batch, **options)
    assert model._softprompt.runner.graphs.statistics.replayed >= 1
    assert_close(recorded.each, expected.each, 1e-9, "losses")
    assert_close(recorded.total, expected.total, 1e-9, "total")
    got = torch.autograd.grad(recorded.total, [prompt_of(model, name) for name in model.peft_config])
    for ours, theirs in zip(got, grads, strict=True):
        assert_close(ours, theirs, 1e-6, "gradient")


def test_a_prompt_is_that_of_its_seed_and_other_random_numbers_are_left_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    base, other = build("bloom"), build("bloom")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    seeded.clear()
    model = ensemble.create(base, [prompt_config(base) for _ in range(3)], seeds=[7, 8, 9])
    assert seeded == []  # numbers of a GPU would not be put back
    assert torch.equal(torch.rand(3), expected)
    for number, seed in enumerate([7, 8, 9], start=1):
        torch.manual_seed(seed)
        single = get_peft_model(other, prompt_config(other))
        assert torch.equal(prompt_of(model, f"prompt-{number}"), prompt_of(single))


def test_votes_go_to_the_label_that_most_prompts_prefer():
    probabilities = torch.tensor(
        [
            [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]],
            [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]],
            [[0.01, 0.98, 0.01], [0.3, 0.3, 0.4]],
        ]
    )
    voted, shares = ensemble.combine(probabilities)
    assert voted.tolist() == [0, 1]  # row 2: one vote each, and the greatest mean goes to label 1
    mean, also = ensemble.combine(probabilities, "mean")
    assert mean.tolist() == [1, 1]
    expected = probabilities.log().mean(0).softmax(1)
    assert torch.equal(shares, expected)
    assert torch.equal(also, expected)


def test_a_probability_of_zero_is_no_veto_on_all_labels():
    probabilities = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    chosen, shares = ensemble.combine(probabilities, "mean")
    assert chosen.tolist() == [1]
    assert torch.isfinite(shares).all()


def test_an_ensemble_of_one_is_refused():
    base = build("bloom")
    with pytest.raises(ValueError, match="an ensemble needs at least two prompts, got 1"):
        ensemble.create(base, [prompt_config(base)])
    model = get_peft_model(base, prompt_config(base))
    with pytest.raises(ValueError, match="an ensemble needs at least two prompts, got 1"):
        ensemble.losses(model, **make_batch())


def test_wrong_calls_say_what_was_expected():
    model, batch = created("bloom", size=2), make_batch()
    with pytest.raises(ValueError, match="unknown adapters other; the model has prompt-1, prompt-2"):
        ensemble.losses(model, **batch, adapters=["prompt-1", "other"])
    with pytest.raises(ValueError, match="every adapter must be named once, got prompt-1, prompt-1"):
        ensemble.losses(model, **batch, adapters=["prompt-1", "prompt-1"])
    with pytest.raises(ValueError, match="adapters must be a list of names, got 'prompt-1'"):
        ensemble.losses(model, **batch, adapters="prompt-1")
    with pytest.raises(ValueError, match="input_ids must be a tensor, got NoneType"):
        ensemble.losses(model, None, None, batch["labels"])
    with pytest.raises(ValueError, match="num_items must be a number of at least 0, got -1"):
        ensemble.losses(model, **batch, num_items_in_batch=-1)
    with pytest.raises(ValueError, match="3 rows cannot be dealt out evenly to 2 prompts"):
        ensemble.losses(model, **batch, own_rows=True)
    with pytest.raises(ValueError, match="an ensemble is trained on labels, got none"):
        ensemble.losses(model, batch["input_ids"])
    with pytest.raises(TypeError, match="a PEFT model with several adapters, got BloomForCausalLM"):
        ensemble.losses(model.get_base_model(), **batch)
    with pytest.raises(ValueError, match="expected one seed for each of 2 prompts, got 1"):
        ensemble.create(build("bloom"), [PromptTuningConfig(task_type="CAUSAL_LM")] * 2, seeds=[1])
    with pytest.raises(ValueError, match="how must be one of 'vote', 'mean', got 'median'"):
        ensemble.combine(torch.ones(2, 1, 2), "median")
    with pytest.raises(ValueError, match=r"probabilities must be \[K, N, C\], got \[2, 2\]"):
        ensemble.combine(torch.ones(2, 2))


def test_a_model_that_cannot_be_packed_is_refused_with_its_reason():
    base = build("mamba")
    model = ensemble.create(base, [prompt_config(base) for _ in range(2)])
    with pytest.raises(softprompt.UnsupportedModelError, match=r"need the packed route: .*state"):
        ensemble.losses(model, **make_batch())
