"""Steps that begin before the model is looked at: taken where nothing has changed, and else as if they had
never been.
"""

import copy
import gc

import pytest
import torch
from attribute_changes import ON_CODE, ON_INSTANCES, steer
from parity import assert_close, assert_same_step, make_batch, prompt_of, step
from peft import PromptEncoderConfig, get_peft_model
from tape import TapeRecorder
from tiny_models import build, pair, prompted
from torch import nn

import softprompt
from softprompt import layout
from softprompt.engine import cuda_graph
from softprompt.engine.guard import Guard, guard_of
from softprompt.engine.runner import runner_of

EXACT = 1e-9


class Events(TapeRecorder):
    """What is replayed and what is checked, in order."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.order = []
        check = Guard.check

        def checked(guard):
            self.order.append("check")
            return check(guard)

        monkeypatch.setattr(Guard, "check", checked)

    def record(self, run, device):
        replay = super().record(run, device)

        def replayed():
            self.order.append("replay")
            replay()

        return replayed


@pytest.fixture
def events(monkeypatch):
    recorder = Events(monkeypatch)
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", recorder)
    return recorder


def recorded_and_eager(name, **options):
    first, second = pair(prompted(name, **options))
    return softprompt.patch(first), softprompt.patch(second, cuda_graphs=False)


def graphs_of(model):
    return model._softprompt.runner.graphs


def warm(model, times=4):
    """Steps of one size until the next one is expected to be like them."""
    for number in range(times):
        model(**make_batch(seed=number)).loss.backward()
    model.zero_grad(set_to_none=True)


def leaf(width=48):
    torch.manual_seed(0)
    return torch.randn(3, width, dtype=torch.float64, requires_grad=True)


def loss_of(base, prompt, seed, **options):
    return softprompt.forward(base, prompt, **make_batch(seed=seed), **options).loss


def warm_base(base, prompt, **options):
    for seed in range(4):
        loss_of(base, prompt, seed, **options).backward()
    prompt.grad = None


def in_vain(tape, graphs, action):
    """How many replays an action makes whose results are not taken."""
    before = tape.replays - graphs.statistics.replayed - graphs.statistics.recorded
    action()
    return tape.replays - graphs.statistics.replayed - graphs.statistics.recorded - before


# ------------------------------------------------------------------------------------------------- the order
@pytest.mark.parametrize("functional", [False, True])
def test_a_step_like_the_two_before_is_replayed_before_the_model_is_looked_at(functional, events):
    base, prompt, model = build("llama"), leaf(), softprompt.patch(prompted("llama"))
    orders = []
    for seed in range(6):
        events.order.clear()
        if functional:
            loss_of(base, prompt, seed).backward()
        else:
            model(**make_batch(seed=seed)).loss.backward()
        orders.append([event for event in events.order if event == "replay" or events.order[0] == "replay"])
    assert orders[2:] == [["replay", "check"]] * 4


def test_the_results_of_early_steps_are_those_of_eager_ones(tape):
    recorded, eager = recorded_and_eager("bloom")
    warm(recorded)
    for seed in range(4):
        batch = make_batch(seed=seed, side=("left", "right")[seed % 2])
        expected, got = step(eager, batch), step(recorded, batch)
        assert_close(got.loss, expected.loss, EXACT, "loss")
        for key, grad in expected.grads.items():
            assert_close(got.grads[key], grad, EXACT, key)
    assert graphs_of(recorded)._expected is not None


def test_a_size_that_is_new_is_laid_out_once(tape, monkeypatch):
    model, _ = recorded_and_eager("llama")
    warm(model)
    reads, read = [], layout.read_counts
    monkeypatch.setattr(layout, "read_counts", lambda tensors: reads.append(True) or read(tensors))
    for number in range(3):
        model(**make_batch((40, 40, 40), seed=number)).loss.backward()
        assert len(reads) == number + 1
    assert graphs_of(model).statistics.recorded == 2


def test_prompts_of_another_length_have_steps_of_their_own(tape):
    base, prompts = build("llama"), [leaf(), leaf()[:2].detach().requires_grad_()]
    warm_base(base, prompts[0])
    graphs = runner_of(base).graphs
    assert in_vain(tape, graphs, lambda: loss_of(base, prompts[1], 3)) == 0
    for prompt in (*prompts, *prompts, *prompts):
        expected = loss_of(base, prompt, 5, cuda_graphs=False).detach()
        assert_close(loss_of(base, prompt, 5).detach(), expected, EXACT, "loss")


def test_modes_that_take_turns_are_not_expected_to_stay(tape):
    model, _ = recorded_and_eager("llama")
    base = model.get_base_model()
    base.train()
    warm(model, 1)

    def alternate():
        for seed in range(8):
            base.train(bool(seed % 2))
            model(**make_batch(seed=seed)).loss.backward()

    assert in_vain(tape, graphs_of(model), alternate) == 0
    assert graphs_of(model).statistics.replayed == 7


# --------------------------------------------------------------------------------------- nothing can be seen
def changes_of(model, monkeypatch):
    base = model.get_base_model()
    return [lambda change=change: change(base) for change in ON_INSTANCES] + [
        lambda change=change: change(monkeypatch.setattr) for change in ON_CODE
    ]


NAMES = [change.__name__ for change in (*ON_INSTANCES, *ON_CODE)]


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_change_of_the_model_counts_at_once(number, tape, monkeypatch):
    recorded, eager = recorded_and_eager("llama")
    warm(recorded)
    batch = make_batch(seed=9)
    before = step(recorded, batch).loss
    changes_of(recorded, monkeypatch)[number]()
    if number < len(ON_INSTANCES):
        changes_of(eager, monkeypatch)[number]()
    random, counted = torch.get_rng_state(), copy.copy(graphs_of(recorded).statistics)
    expected = step(eager, batch)
    got = step(recorded, batch)
    assert abs(got.loss - before) > 1e-6
    assert_close(got.loss, expected.loss, EXACT, "loss")
    assert_close(got.logits, expected.logits, EXACT, "logits")
    assert got.grads.keys() == expected.grads.keys()
    for key, grad in expected.grads.items():
        assert_close(got.grads[key], grad, EXACT, key)
    assert torch.equal(torch.get_rng_state(), random)
    assert graphs_of(recorded).statistics.replayed == counted.replayed


def test_a_replay_in_vain_counts_nowhere_and_leaves_the_order_of_the_graphs(tape):
    base, prompt = build("llama"), leaf()
    warm_base(base, prompt)
    graphs = runner_of(base).graphs
    statistics = copy.copy(vars(graphs.statistics))
    base.train()
    base.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.warns(UserWarning, match="not recorded: dropout is on"):
        assert in_vain(tape, graphs, lambda: loss_of(base, prompt, 3)) == 1
    assert vars(graphs.statistics) == statistics
    assert in_vain(tape, graphs, lambda: loss_of(base, prompt, 3)) == 0
    assert prompt.grad is None


def test_dropout_that_is_switched_on_draws_the_numbers_of_an_eager_step(tape):
    losses = []
    for model in recorded_and_eager("gpt2-dropout"):
        model.eval()
        warm(model)
        model.train()
        torch.manual_seed(5)
        losses.append(model(**make_batch(seed=4)).loss.detach())
        losses.append(torch.rand(3, dtype=torch.float64))
    assert_close(losses[0], losses[2], EXACT, "loss")
    assert torch.equal(losses[1], losses[3])


def test_a_hook_that_is_added_sees_one_step(tape):
    model, _ = recorded_and_eager("llama")
    warm(model)
    calls = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(True))
    with pytest.warns(UserWarning, match="not recorded: modules of the language model have hooks"):
        assert in_vain(tape, graphs_of(model), lambda: model(**make_batch()).loss.backward()) == 1
    assert len(calls) == 1


def test_what_is_saved_for_the_backward_is_packed_once(tape):
    """Of the encoder and of the replayed step; nothing of a step that began before."""
    model, _ = recorded_and_eager("llama")
    warm(model)
    packed = []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert in_vain(tape, graphs_of(model), lambda: model(**make_batch(seed=3)).loss.backward()) == 0
    assert len(packed) == len(set(packed)) + packed.count((4, 48)) - 1
    assert packed.count((4, 48)) == 2  # the prompts and their gradient


def test_anomaly_detection_sees_one_step(tape):
    model, _ = recorded_and_eager("llama")
    warm(model)
    before = tape.replays
    with torch.autograd.set_detect_anomaly(True, check_nan=False), pytest.warns(UserWarning, match="anomaly"):
        model(**make_batch()).loss.backward()
    assert tape.replays == before


# ------------------------------------------------------------------------------------- memory and bad batches
def another_place(weight):
    weight.data = weight.data.clone()


def freed(weight):
    weight.data = torch.zeros(1, dtype=weight.dtype).expand(weight.shape)


@pytest.mark.parametrize("move", [another_place, freed])
def test_a_step_is_not_replayed_where_a_weight_has_left_its_place(move, tape):
    base, prompt = build("llama"), leaf()
    warm_base(base, prompt)
    graphs, before = runner_of(base).graphs, tape.replays
    move(base.model.layers[0].mlp.up_proj.weight)
    expected = loss_of(base, prompt, 3, cuda_graphs=False)
    assert_close(loss_of(base, prompt, 3).detach(), expected.detach(), EXACT, "loss")
    assert tape.replays == before
    assert graphs.statistics.dropped == 1


def test_a_step_is_not_replayed_where_a_weight_is_gone(tape):
    base, prompt = build("llama"), leaf()
    warm_base(base, prompt)
    before = tape.replays
    base.model.layers[0].mlp.up_proj = copy.deepcopy(base.model.layers[0].mlp.up_proj)
    gc.collect()
    loss_of(base, prompt, 3)
    assert tape.replays == before


def test_a_step_is_not_replayed_where_another_look_has_seen_other_weights(tape):
    """Then the guard knows their new place, and not that of the recording."""
    base, prompt = build("llama"), leaf()
    warm_base(base, prompt)
    before = tape.replays
    another_place(base.lm_head.weight)
    guard_of(base).check()
    loss_of(base, prompt, 3)
    assert tape.replays == before


@pytest.mark.parametrize("name", ["input_ids", "labels"])
@pytest.mark.parametrize("value", [-1, 10**6])
def test_a_batch_outside_of_the_vocabulary_raises_before_anything_is_replayed(name, value, tape):
    recorded, eager = recorded_and_eager("bloom")
    warm(recorded)
    batch, before = make_batch(seed=3), tape.replays
    batch[name][1, 1] = value
    messages = []
    for model in (recorded, eager):
        with pytest.raises(IndexError) as error:
            model(**batch)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert f"{name}[1, 1] = {value}" in messages[0]
    assert tape.replays == before
    good = make_batch(seed=21)
    assert_close(step(recorded, good).loss, step(eager, good).loss, EXACT, "loss")


def test_an_id_of_a_table_that_was_made_larger_is_looked_up_there(tape):
    model, _ = recorded_and_eager("llama")
    warm(model)
    base = model.get_base_model()
    known = base.get_input_embeddings().num_embeddings
    base.resize_token_embeddings(known + 4, mean_resizing=False)
    base.requires_grad_(False)
    batch = make_batch(seed=3)
    batch["input_ids"][0, 0] = known + 1
    expected = softprompt.patch(copy.deepcopy(softprompt.unpatch(model)), cuda_graphs=False)
    softprompt.patch(model)
    assert_close(step(model, batch).loss, step(expected, batch).loss, EXACT, "loss")


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": torch.zeros(2, 8, dtype=torch.long)},
        {"labels": torch.zeros(3, 8)},
        {"attention_mask": torch.ones(3, 7)},
        {"input_ids": torch.zeros(3, 8)},
        {"num_items_in_batch": -2},
        {"num_items_in_batch": torch.tensor([1.0, 2.0])},
        {"adapter_names": ["nobody"] * 3},
        {"task_ids": "x", "position_ids": torch.zeros(3, 8, dtype=torch.long)},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_a_call_that_fails_fails_as_an_eager_one(wrong, tape):
    outcomes = []
    for model in recorded_and_eager("llama"):
        warm(model)
        try:
            outcomes.append(model(**{**make_batch(seed=5), **wrong}).loss.item())
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


def test_calls_that_are_no_training_steps_begin_nothing_early(tape):
    model, eager = recorded_and_eager("llama")
    warm(model)
    before, batch = tape.replays, make_batch(seed=3)
    with torch.no_grad():
        assert_close(model(**batch).loss, eager(**batch).loss, EXACT, "loss")
    with torch.inference_mode():
        model(**batch)
    unlabelled = make_batch(labels=None)
    assert_close(model(**unlabelled).logits, eager(**unlabelled).logits, EXACT, "logits")
    embeds = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del embeds["input_ids"]
    with pytest.warns(UserWarning, match="inputs_embeds"):
        model(**embeds)
    prompt_of(model).requires_grad_(False)
    model(**batch)
    assert tape.replays == before
    prompt_of(model).requires_grad_(True)
    assert in_vain(tape, graphs_of(model), lambda: model(**batch).loss.backward()) == 0
    assert tape.replays > before


def test_a_step_under_autocast_has_its_numbers(tape):
    recorded, eager = recorded_and_eager("llama", dtype=torch.float32)
    warm(recorded)
    with torch.autocast("cpu", torch.bfloat16):
        batch = make_batch(seed=3)
        assert_close(recorded(**batch).loss.detach(), eager(**batch).loss.detach(), EXACT, "loss")


def test_an_interrupt_in_an_early_replay_leaves_the_next_step_right(tape):
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
    for seed in range(4):
        batch = make_batch(seed=seed)
        assert_close(step(recorded, batch).loss, step(eager, batch).loss, EXACT, "loss")


# ---------------------------------------------------------------------------------------- the way of the call
def test_a_call_that_goes_to_peft_is_pefts(tape):
    fast, stock = pair(prompted("llama"))
    softprompt.patch(fast)
    warm(fast)
    graphs = graphs_of(fast)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        assert in_vain(
            tape, graphs, lambda: assert_same_step(fast, stock, make_batch(seed=2), output_hidden_states=True)
        )
    warm(fast)
    for model in (fast, stock):
        model.get_base_model().config.output_router_logits = True
    with pytest.warns(UserWarning, match="output_router_logits"):
        assert_same_step(fast, stock, make_batch(seed=2))


@pytest.mark.parametrize("kind", ["hook", "dropout"])
def test_an_encoder_that_leaves_a_trace_runs_once_in_every_step(kind, tape):
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=2,
        encoder_dropout=0.5 if kind == "dropout" else 0.0,
    )
    model = get_peft_model(build("llama"), config)
    model.prompt_encoder.to(torch.float64)
    softprompt.patch(model)
    calls = []
    if kind == "hook":
        model.prompt_encoder["default"].register_forward_hook(lambda *_: calls.append(True))
    warm(model)
    model.prompt_encoder.train()
    graphs = graphs_of(model)
    assert graphs._expected is not None
    begun, graphs.begin = [], lambda *args, **kwargs: begun.append(args)
    model(**make_batch(seed=3)).loss.backward()
    assert not begun
    assert len(calls) == (5 if kind == "hook" else 0)


# ------------------------------------------------------------------------------ recordings that leave a trace
LIBRARY = {"__name__": "torch.nn.modules.of_a_test", "torch": torch, "nn": nn}
exec(
    """
class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        self.count += 1
        return nn.functional.silu(x)
""",
    LIBRARY,
)


def counting(base):
    base.model.layers[0].mlp.act_fn = LIBRARY["Counting"]()


def drawing(base):
    base.model.layers[0].mlp.act_fn = nn.RReLU(0.1, 0.4)
    base.model.layers[0].mlp.act_fn.train()


@pytest.mark.parametrize("change", [counting, drawing, steer], ids=lambda change: change.__name__)
def test_a_step_that_leaves_a_trace_is_not_replayed_before_the_model_is_looked_at(change, events):
    base, prompt = build("llama"), leaf()
    change(base)
    base.requires_grad_(False)
    for seed in range(5):
        events.order.clear()
        loss_of(base, prompt, seed).backward()
    assert "replay" in events.order
    assert events.order[0] == "check"
    recorded = runner_of(base).graphs._graphs
    assert recorded
    assert not any(one.leaves_no_trace for one in recorded.values())


def test_a_recording_that_runs_python_again_is_not_run_before_the_model_is_looked_at(monkeypatch):
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", cuda_graph.RerunRecorder())
    model, _ = recorded_and_eager("llama")
    warm(model)
    (recorded,) = graphs_of(model)._graphs.values()
    assert not recorded.leaves_no_trace
