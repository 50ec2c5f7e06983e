"""A recorded step, played back, is the step: on changing batches, prompts, adapters, modes and models."""

import gc
import itertools
import warnings
import weakref

import pytest
import torch
from marks import slow_unless
from parity import assert_close, assert_same_step, make_batch, prompt_of, step
from tiny_models import build, pair, prompt_config, prompted
from torch import nn

import softprompt
from softprompt.engine import cuda_graph, step_graph
from softprompt.engine.cuda_graph import RecordingError, RerunRecorder
from softprompt.engine.step_graph import bucket_of

FEW_LABELS = ("answer", "first")  # one bucket for all batches
EXACT = 1e-9  # fp64, but for softmax, rotary tables and ALiBi, which are fp32 on both sides


@pytest.fixture(params=["tape"])
def recorder(request, tape, monkeypatch):
    if request.param == "tape":
        return tape
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", RerunRecorder())
    return cuda_graph.RECORDERS["cpu"]


def recorded_and_eager(name, **options):
    """The same patched model twice, with and without recorded steps."""
    first, second = pair(prompted(name, **options))
    return (
        softprompt.patch(first, on_unsupported="error"),
        softprompt.patch(second, on_unsupported="error", cuda_graphs=False),
    )


def graphs_of(model):
    return model._softprompt.runner.graphs


def batches(count, kinds=("everywhere", "answer", "first", "pads"), **options):
    """Batches of changing lengths, sides and labels."""
    generator = torch.Generator().manual_seed(5)
    for number in range(count):
        lengths = torch.randint(1, 9, (3,), generator=generator).tolist()
        labels, side = kinds[number % len(kinds)], ("left", "right")[number % 2]
        yield make_batch(lengths, side, labels, seed=number, width=10, **options)


def assert_same_losses(recorded, eager, count):
    for batch in batches(count):
        assert_close(step(recorded, batch).loss, step(eager, batch).loss, EXACT, "loss")


def warm(model, times=3):
    """Steps of one size until it is recorded."""
    for number in range(times):
        model(**make_batch(seed=number)).loss.backward()
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200, 1023, 1024, 1025, 4100, 100_000])
@pytest.mark.parametrize("smallest", [16, 64])
def test_a_bucket_holds_the_count_and_wastes_little(count, smallest):
    bucket = bucket_of(count, smallest)
    assert count <= bucket <= max(count + smallest, count * 17 / 16)
    assert bucket % smallest == 0
    assert bucket_of(bucket, smallest) == bucket
    assert bucket_of(count + 1, smallest) >= bucket


@pytest.mark.parametrize(
    "recorder, name",
    slow_unless(
        {("tape", "bloom"), ("tape", "gemma2"), ("rerun", "llama")},
        itertools.product(
            ["tape", "rerun"],
            ["bloom", "llama", "gpt2", "gemma2", "opt", "qwen2-window", "cohere", "granite"],
        ),
    ),
    indirect=["recorder"],
)
def test_fifty_steps_of_changing_batches_equal_the_eager_ones(name, recorder):
    recorded, eager = recorded_and_eager(name)
    for batch in batches(50):
        expected, got = step(eager, batch), step(recorded, batch)
        assert_close(got.loss, expected.loss, EXACT, "loss")
        assert got.grads.keys() == expected.grads.keys()
        for key, grad in expected.grads.items():
            assert_close(got.grads[key], grad, EXACT, key)
    statistics = graphs_of(recorded).statistics
    assert statistics.replayed > 40
    assert statistics.replayed + statistics.eager == 50
    assert graphs_of(recorded).obstacle is None


def test_a_recorded_step_is_pefts_step(recorder):
    fast, stock = pair(prompted("llama"))
    softprompt.patch(fast, on_unsupported="error")
    for batch in batches(8):
        assert_same_step(fast, stock, batch)
    assert recorder.replays > 4


def test_the_tape_notices_a_step_that_depends_on_the_host(recorder):
    """Otherwise the tests here could not fail."""
    source, target = torch.ones(3), torch.empty(3)
    counter = [0.0]

    def run():
        counter[0] += 1
        target.copy_(source * counter[0])

    replay = recorder.record(run, source.device)
    source.fill_(5)
    replay()
    assert target.tolist() == [10.0] * 3  # the factor of the recording, 2, on the new values
    with pytest.raises(RecordingError, match="the host reads"):
        recorder.record(lambda: target.fill_(source.sum().item()), source.device)


def test_a_size_is_recorded_when_it_comes_the_second_time(recorder):
    model, _ = recorded_and_eager("llama")
    short, long = make_batch(seed=1), make_batch((40, 40, 40), seed=1)
    counts = []
    for batch in (short, long, short, long, short):
        model(**batch).loss.backward()
        counts.append(len(graphs_of(model)))
    assert counts == [0, 0, 1, 2, 2]
    assert graphs_of(model).statistics.eager == 2


def test_one_graph_serves_all_batches_of_a_bucket(recorder):
    model, _ = recorded_and_eager("llama")
    for batch in batches(12, FEW_LABELS):
        model(**batch).loss.backward()
    assert len(graphs_of(model)) == 1


def test_the_graphs_used_least_recently_are_dropped(recorder, monkeypatch):
    monkeypatch.setattr(step_graph, "MAX_GRAPHS", 2)
    model, eager = recorded_and_eager("llama")
    sizes = [make_batch((length,) * 4, seed=1) for length in (8, 24, 40)]
    first = None
    for batch in (sizes[0], sizes[0], sizes[1], sizes[1], sizes[0], sizes[2], sizes[2], sizes[0], sizes[1]):
        expected, got = step(eager, batch), step(model, batch)
        assert_close(
            got.grads["prompt_encoder.default.embedding.weight"],
            expected.grads[next(iter(expected.grads))],
            EXACT,
            "gradient",
        )
        if first is None and len(graphs_of(model)) == 2:
            first = weakref.ref(list(graphs_of(model)._graphs.values())[0 if batch is sizes[1] else 1])
    assert len(graphs_of(model)) == 2
    assert graphs_of(model).statistics.dropped == 1
    assert graphs_of(model).statistics.recorded == 3


def test_logits_are_those_of_their_own_forward_after_later_steps(recorder):
    fast, stock = pair(prompted("gemma2"))
    softprompt.patch(fast, on_unsupported="error")
    warm(fast)
    batch = make_batch(seed=11, labels="everywhere")
    output = fast(**batch)
    with torch.no_grad():
        expected = stock(**batch).logits
        prompt_of(fast).mul_(2)
    fast(**make_batch(seed=12)).loss.backward()
    real = torch.cat([torch.ones(3, 4, dtype=torch.bool), batch["attention_mask"].bool()], 1)
    assert not output.logits.is_materialized
    assert_close(output.logits[real], expected[real], 2e-6, "logits")


@pytest.mark.parametrize("with_loss", [True, False])
def test_a_loss_made_of_the_logits_reaches_the_prompt(with_loss, recorder):
    fast, stock = pair(prompted("llama"))
    softprompt.patch(fast, on_unsupported="error")
    warm(fast)
    batch = make_batch(seed=4)
    real = torch.cat([torch.ones(3, 4, dtype=torch.bool), batch["attention_mask"].bool()], 1)
    for model in (fast, stock):
        output = model(**batch)
        own = output.logits[real].square().mean()
        (own + output.loss if with_loss else own).backward()
    assert graphs_of(fast).statistics.replayed > 1
    assert_close(prompt_of(fast).grad, prompt_of(stock).grad, 1e-5, "gradient")


def test_gradients_accumulate_over_forwards_that_came_before_their_backwards(recorder):
    recorded, eager = recorded_and_eager("bloom")
    warm(recorded)
    for model in (recorded, eager):
        losses = [model(**batch).loss / (number + 1) for number, batch in enumerate(batches(4))]
        for loss in losses:
            (loss * 3).backward()
    assert graphs_of(recorded).statistics.replayed >= 5
    assert_close(prompt_of(recorded).grad, prompt_of(eager).grad, EXACT, "gradient")


def test_a_graph_can_be_walked_twice(recorder):
    recorded, eager = recorded_and_eager("llama")
    warm(recorded)
    for model in (recorded, eager):
        loss = model(**make_batch(seed=9)).loss
        loss.backward(retain_graph=True)
        loss.backward()
    assert_close(prompt_of(recorded).grad, prompt_of(eager).grad, EXACT, "gradient")


@pytest.mark.parametrize("num_items", [5, torch.tensor(7), torch.tensor([3.0])])
def test_the_losses_denominator_may_change_from_step_to_step(num_items, recorder):
    recorded, eager = recorded_and_eager("llama")
    warm(recorded)
    for items in (num_items, 11, None, num_items):
        for batch in batches(2):
            expected = step(eager, batch, num_items_in_batch=items)
            got = step(recorded, batch, num_items_in_batch=items)
            assert_close(got.loss, expected.loss, EXACT, "loss")


def test_training_follows_the_eager_curve_through_optimizer_and_schedule(recorder):
    recorded, eager = recorded_and_eager("bloom")
    curves = []
    for model in (recorded, eager):
        optimizer = torch.optim.AdamW([prompt_of(model)], lr=3e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
        curves.append([])
        for batch in batches(20):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            curves[-1].append(loss.item())
    assert torch.allclose(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-7)
    assert_close(prompt_of(recorded).detach(), prompt_of(eager).detach(), 1e-7, "prompt")


def two_adapters():
    model = prompted("llama")
    torch.manual_seed(8)
    model.add_adapter("other", prompt_config(model.get_base_model(), 7))
    model.prompt_encoder.to(torch.float64)
    for parameter in model.prompt_encoder.parameters():
        parameter.requires_grad_(True)
    first, second = pair(model)
    return softprompt.patch(first), softprompt.patch(second, cuda_graphs=False)


def test_rows_of_different_adapters_share_a_recorded_step(recorder):
    recorded, eager = two_adapters()
    orders = (["default", "other", "other"], ["other", "default", "other"], ["default", "other", "default"])
    for number, batch in enumerate(batches(9)):
        names = orders[number % 3]
        expected, got = step(eager, batch, adapter_names=names), step(recorded, batch, adapter_names=names)
        assert got.grads.keys() == expected.grads.keys()
        assert len(got.grads) == 2
        for key, grad in expected.grads.items():
            assert_close(got.grads[key], grad, EXACT, key)
    assert graphs_of(recorded).statistics.replayed >= 5


def test_a_switch_of_the_active_adapter_is_followed(recorder):
    recorded, eager = two_adapters()
    for number, batch in enumerate(batches(8, FEW_LABELS)):
        for model in (recorded, eager):
            model.set_adapter(("default", "other")[number % 2])
        expected, got = step(eager, batch), step(recorded, batch)
        for key, grad in expected.grads.items():
            assert_close(got.grads[key], grad, EXACT, key)
    assert len(graphs_of(recorded)) == 2


def test_an_adapter_with_a_frozen_prompt_is_no_training_step(recorder):
    model, _ = recorded_and_eager("llama")
    prompt_of(model).requires_grad_(False)
    for batch in batches(3):
        assert not model(**batch).loss.requires_grad
    assert len(graphs_of(model)) == 0


def test_another_dtype_makes_new_graphs(recorder):
    recorded, eager = recorded_and_eager("llama")
    for dtype in (torch.float64, torch.float32):
        for model in (recorded, eager):
            model.to(dtype)
        for batch in batches(4, FEW_LABELS):
            expected, got = step(eager, batch), step(recorded, batch)
            assert got.loss.dtype == expected.loss.dtype == dtype
            assert_close(got.loss, expected.loss, 1e-5, "loss")
    assert len(graphs_of(recorded)) == 1
    assert graphs_of(recorded).statistics.dropped == 1


def test_training_and_evaluation_take_turns(recorder):
    recorded, eager = recorded_and_eager("gpt2")
    for batch in batches(8, FEW_LABELS):
        for training in (True, False):
            losses = []
            for model in (recorded, eager):
                model.train(training)
                with torch.set_grad_enabled(training):
                    loss = model(**batch).loss
                if training:
                    loss.backward()
                losses.append(loss.detach())
            assert_close(*losses, EXACT, "loss")
    assert len(graphs_of(recorded)) == 1
    assert_close(prompt_of(recorded).grad, prompt_of(eager).grad, EXACT, "gradient")


def test_dropout_keeps_a_step_eager_and_is_named_once(recorder):
    model, _ = recorded_and_eager("gpt2-dropout")
    model.train()
    with pytest.warns(UserWarning, match=r"not recorded: dropout is on in the language model \(Dropout"):
        model(**make_batch()).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(**make_batch()).loss.backward()
    assert len(graphs_of(model)) == 0
    model.eval()
    warm(model)
    assert len(graphs_of(model)) == 1
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    attention = [m for m in model.modules() if "Attention" in type(m).__name__]
    assert attention
    model.train()
    warm(model)
    assert "dropout" not in str(graphs_of(model).obstacle) or graphs_of(model).obstacle is None


def test_a_bad_id_raises_and_the_next_step_is_right(recorder):
    recorded, eager = recorded_and_eager("bloom")
    warm(recorded)
    bad = make_batch(seed=3)
    bad["input_ids"][1, 2] = 12345
    bad["attention_mask"][1, 2] = 1
    with pytest.raises(IndexError, match=r"input_ids\[1, 2\] = 12345"):
        recorded(**bad)
    batch = make_batch(seed=21)
    assert_close(step(recorded, batch).loss, step(eager, batch).loss, EXACT, "loss")
    assert len(graphs_of(recorded)) == 1


class Refusing(RerunRecorder):
    """Fails in the middle of a recording."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def record(self, run, device):
        self.calls += 1
        run()
        raise self.error


@pytest.mark.parametrize("error", [RecordingError("no reason"), RuntimeError("out of memory")])
def test_a_recording_that_fails_is_tried_once_and_the_eager_step_takes_over(error, monkeypatch):
    refusing = Refusing(error)
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", refusing)
    recorded, eager = recorded_and_eager("llama")
    with pytest.warns(UserWarning, match=f"not recorded: recording failed: .*{error}"):
        assert_same_losses(recorded, eager, 4)
    assert refusing.calls == 1
    assert "recording failed" in graphs_of(recorded).obstacle


def test_an_exception_inside_a_replay_leaves_the_next_step_right(recorder, monkeypatch):
    recorded, eager = recorded_and_eager("llama")
    warm(recorded)
    (graph,) = graphs_of(recorded)._graphs.values()
    play, failures = graph.replay, [KeyboardInterrupt()]

    def interrupted():
        if failures:
            raise failures.pop()
        play()

    object.__setattr__(graph, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorded(**make_batch(seed=30))
    assert_same_losses(recorded, eager, 3)


def test_models_take_turns_without_mixing(recorder):
    pairs = [recorded_and_eager(name) for name in ("llama", "bloom", "gpt2")]
    for batch in batches(6, FEW_LABELS):
        for recorded, eager in pairs:
            assert_close(step(recorded, batch).loss, step(eager, batch).loss, EXACT, "loss")
    assert all(len(graphs_of(recorded)) == 1 for recorded, _ in pairs)


def test_a_hook_on_a_layer_is_called_at_every_step(recorder):
    model, _ = recorded_and_eager("llama")
    warm(model)
    calls = []
    layer = model.get_base_model().model.layers[0]
    handle = layer.register_forward_hook(lambda *_: calls.append(True))
    with pytest.warns(UserWarning, match="not recorded: modules of the language model have hooks"):
        warm(model, 3)
    assert len(calls) == 3
    handle.remove()
    warm(model, 1)
    assert len(calls) == 3
    assert graphs_of(model).obstacle is None


def test_a_trainable_base_gets_its_gradients(recorder):
    fast, stock = pair(prompted("llama"))
    for model in (fast, stock):
        model.get_base_model().model.norm.weight.requires_grad_(True)
    softprompt.patch(fast, on_unsupported="error")
    with pytest.warns(UserWarning, match="not recorded: the language model has trainable weights"):
        assert_same_step(fast, stock, make_batch(seed=1))
    for batch in batches(3):
        assert_same_step(fast, stock, batch)


def test_weights_changed_in_place_count_at_once(recorder):
    recorded, eager = recorded_and_eager("llama")
    warm(recorded)
    for model in (recorded, eager):
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(1.5)
    batch = make_batch(seed=2)
    assert_close(step(recorded, batch).loss, step(eager, batch).loss, EXACT, "loss")
    assert graphs_of(recorded).statistics.recorded == 1


@pytest.mark.parametrize("what", ["module", "weight"])
def test_a_replaced_part_makes_new_graphs(what, recorder):
    recorded, eager = recorded_and_eager("llama")
    warm(recorded)
    for model in (recorded, eager):
        mlp = model.get_base_model().model.layers[1].mlp
        weight = nn.Parameter(mlp.up_proj.weight.detach() * 0.5, requires_grad=False)
        if what == "module":
            other = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            other.weight = weight
            mlp.up_proj = other
        else:
            mlp.up_proj.weight = weight
    batch = make_batch(seed=2)
    for _ in range(3):
        assert_close(step(recorded, batch).loss, step(eager, batch).loss, EXACT, "loss")
    assert graphs_of(recorded).statistics.recorded == 2


def test_autocast_has_graphs_of_its_own(recorder):
    recorded, eager = recorded_and_eager("llama", dtype=torch.float32)
    for number, batch in enumerate(batches(8, FEW_LABELS)):
        with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 0):
            losses = [model(**batch).loss for model in (recorded, eager)]
        for loss in losses:
            loss.backward()
        assert_close(losses[0].detach(), losses[1].detach(), 2e-2 if number % 2 == 0 else 1e-5, "loss")
    assert len(graphs_of(recorded)) == 2


def obstacle_after(model, batch=None, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            model(**(batch or make_batch()), **kwargs).loss.backward()
    assert len(graphs_of(model)) == 0
    return graphs_of(model).obstacle


def test_half_precision_whose_gradients_are_scaled_later_stays_eager(recorder):
    model, _ = recorded_and_eager("llama", dtype=torch.float16)
    assert "fp16 gradients" in obstacle_after(model)


def test_layers_that_are_skipped_at_random_stay_eager(recorder):
    model, _ = recorded_and_eager("opt", layerdrop=0.5)
    model.train()
    assert "layerdrop=0.5" in obstacle_after(model)
    model.eval()
    warm(model)
    assert graphs_of(model).statistics.replayed > 0


def test_gradient_checkpointing_stays_eager(recorder):
    model, _ = recorded_and_eager("llama")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert "checkpointing" in obstacle_after(model) or "hooks" in obstacle_after(model)


def test_embeddings_instead_of_ids_stay_eager(recorder):
    model, _ = recorded_and_eager("llama")
    batch = make_batch()
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    assert "inputs_embeds" in obstacle_after(model, batch)


def test_rope_that_depends_on_the_batch_stays_eager(recorder):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model, _ = recorded_and_eager("llama", rope_parameters=rope, max_position_embeddings=32)
    assert "rotary" in obstacle_after(model)


def test_anomaly_detection_stays_eager(recorder):
    model, _ = recorded_and_eager("llama")
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        assert "anomaly" in obstacle_after(model)


def test_without_a_recorder_nothing_is_said(monkeypatch):
    monkeypatch.delitem(cuda_graph.RECORDERS, "cpu", raising=False)
    model, _ = recorded_and_eager("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm(model)
    assert graphs_of(model).obstacle == "CUDA graphs need a CUDA device, the batch is on cpu"


def test_a_model_that_reads_from_the_device_stays_eager(recorder):
    """GPT-J builds its rotary table with a read."""
    recorded, eager = recorded_and_eager("gpt_oss")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in batches(4):
            assert_close(step(recorded, batch).loss, step(eager, batch).loss, EXACT, "loss")
    obstacle = graphs_of(recorded).obstacle
    assert obstacle is None or "the host reads" in obstacle


def test_no_labels_at_all_give_a_loss_of_zero_and_a_zero_gradient(recorder):
    model, _ = recorded_and_eager("llama")
    batch = make_batch()
    batch["labels"].fill_(-100)
    for _ in range(4):
        with pytest.warns(UserWarning, match="every label of this batch is -100"):
            loss = model(**batch).loss
        loss.backward()
        assert loss.item() == 0
        assert prompt_of(model).grad.eq(0).all()
    assert graphs_of(model).statistics.replayed == 3


def test_compact_positions_are_recorded_too(recorder):
    first, second = pair(prompted("bloom"))
    recorded = softprompt.patch(first, positions="compact")
    eager = softprompt.patch(second, positions="compact", cuda_graphs=False)
    for batch in batches(6, holes=True):
        expected, got = step(eager, batch), step(recorded, batch)
        assert_close(got.loss, expected.loss, EXACT, "loss")
    assert graphs_of(recorded).statistics.replayed > 3


def test_the_functional_form_records_too(recorder):
    base = build("llama")
    torch.manual_seed(0)
    prompts = [torch.randn(length, 48, dtype=torch.float64, requires_grad=True) for length in (3, 5)]
    for batch in batches(6):
        got, expected = (
            torch.autograd.grad(
                softprompt.forward(
                    base, prompts, **batch, prompt_of_row=[1, 0, 1], cuda_graphs=recorded
                ).loss,
                prompts,
            )
            for recorded in (True, False)
        )
        for left, right in zip(got, expected, strict=True):
            assert_close(left, right, EXACT, "gradient")
    assert recorder.replays > 3


def test_graphs_go_with_the_patch_and_with_the_model(recorder):
    model, _ = recorded_and_eager("llama")
    warm(model)
    graph = weakref.ref(next(iter(graphs_of(model)._graphs.values())))
    softprompt.unpatch(model)
    gc.collect()
    assert graph() is None
    softprompt.patch(model)
    warm(model)
    graph, base = (
        weakref.ref(next(iter(graphs_of(model)._graphs.values()))),
        weakref.ref(model.get_base_model()),
    )
    del model
    gc.collect()
    assert graph() is None
    assert base() is None


def test_the_functional_forms_graphs_go_with_the_model(recorder):
    base = build("llama")
    prompt = torch.zeros(3, 48, dtype=torch.float64, requires_grad=True)
    for batch in batches(3):
        softprompt.forward(base, prompt, **batch).loss.backward()
    reference = weakref.ref(base)
    del base
    gc.collect()
    assert reference() is None


def test_patching_again_starts_with_the_new_options(recorder):
    model, _ = recorded_and_eager("llama")
    warm(model)
    softprompt.patch(model, cuda_graphs=False)
    before = recorder.replays
    warm(model)
    assert recorder.replays == before
