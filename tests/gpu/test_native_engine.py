"""Patched models on a GPU: parity, recorded steps, memory and bad input. What can, runs on the CPU too."""

import gc

import pytest
import torch
from marks import slow_unless
from parity import assert_close, make_batch, prompt_of, relative_error, step
from tiny_models import pair, prompted

import softprompt
from softprompt.engine import cuda_graph

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
VOCABULARY = 97
SHAPES = {
    "bloom": {"hidden_size": 256, "n_layer": 3, "n_head": 4},
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "max_position_embeddings": 256,
    },
}


def on(device, batch):
    return {name: value.to(device) for name, value in batch.items()}


def batches(device, count, longest=40):
    generator = torch.Generator().manual_seed(4)
    for number in range(count):
        lengths = torch.randint(1, longest, (4,), generator=generator).tolist()
        labels = ("answer", "everywhere")[number % 2]
        batch = make_batch(lengths, ("left", "right")[number % 2], labels, seed=number, width=longest + 2)
        yield on(device, batch)


def models(name, device, dtype=torch.float32, **options):
    """PEFT's model, and the same patched."""
    stock, fast = pair(prompted(name, dtype, num_virtual_tokens=9, **SHAPES[name]))
    for model in (stock, fast):
        model.prompt_encoder.float()  # as PEFT trains it
        model.to(device)
    return stock, softprompt.patch(fast, on_unsupported="error", **options)


@pytest.fixture
def recording(device, tape):
    """The device's own recorder, or the tape on the CPU."""
    return cuda_graph.RECORDERS[device]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", SHAPES)
def test_fp32_steps_are_pefts(name, device, recording):
    stock, fast = models(name, device)
    for batch in batches(device, 12):
        expected, got = step(stock, batch), step(fast, batch)
        assert_close(got.loss, expected.loss, 1e-5, "loss")
        for key, grad in expected.grads.items():
            assert_close(got.grads[key], grad, 2e-4, key)
    assert fast._softprompt.runner.graphs.statistics.replayed > 1


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    "name, cuda_graphs",
    slow_unless({("llama", True)}, [(name, graphs) for name in SHAPES for graphs in (True, False)]),
)
def test_bf16_steps_are_as_near_to_the_truth_as_pefts(name, cuda_graphs, device, recording):
    """The truth is PEFT in fp32 on the same rounded weights."""
    stock, fast = models(name, device, torch.bfloat16, cuda_graphs=cuda_graphs)
    truth, _ = models(name, device)
    truth.load_state_dict(stock.state_dict(), strict=False)
    truth.get_base_model().load_state_dict(
        {key: value.float() for key, value in stock.get_base_model().state_dict().items()}
    )
    with torch.no_grad():
        prompt_of(truth).copy_(prompt_of(stock))
    ours, theirs = [], []
    for batch in batches(device, 6):
        right, one, other = step(truth, batch), step(fast, batch), step(stock, batch)
        for errors, got in ((ours, one), (theirs, other)):
            (key,) = right.grads
            assert got.grads[key].dtype == torch.float32
            errors.append(
                (relative_error(got.loss, right.loss), relative_error(got.grads[key], right.grads[key]))
            )
    for index, floor in ((0, 2e-3), (1, 1e-2)):
        mine, limit = (sum(error[index] for error in errors) / len(errors) for errors in (ours, theirs))
        assert mine <= 2 * limit + floor


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", slow_unless(["bloom"], SHAPES))
def test_fifty_replayed_steps_follow_the_eager_curve(name, device, recording):
    _, eager = models(name, device, cuda_graphs=False)
    _, fast = models(name, device)
    curves = []
    for model in (eager, fast):
        optimizer = torch.optim.AdamW([prompt_of(model)], lr=1e-2)
        losses = []
        for batch in batches(device, 50):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    statistics = fast._softprompt.runner.graphs.statistics
    assert statistics.replayed > 15
    assert (curves[0] - curves[1]).abs().max() <= 2e-3 * curves[0].abs().max()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bad_ids_raise_and_the_next_step_is_right(device, recording):
    stock, fast = models("llama", device)
    for _ in range(3):
        fast(**on(device, make_batch())).loss.backward()
    bad = on(device, make_batch(seed=3, labels="everywhere"))
    bad["input_ids"][1, 0] = 4_000_000
    with pytest.raises(IndexError, match=r"input_ids\[1, 0\] = 4000000"):
        fast(**bad)
    bad = on(device, make_batch(seed=3, labels="everywhere"))
    bad["labels"][0, 2] = -7
    with pytest.raises(IndexError, match=r"labels\[0, 2\] = -7"):
        fast(**bad)
    batch = on(device, make_batch(seed=5))
    assert_close(step(fast, batch).loss, step(stock, batch).loss, 1e-5, "loss")


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_five_hundred_steps_need_no_more_memory(cuda_graphs):
    _, fast = models("bloom", "cuda", torch.bfloat16, cuda_graphs=cuda_graphs)
    prepared = list(batches("cuda", 25))
    reserved = []
    for number in range(500):
        fast(**prepared[number % 25]).loss.backward()
        prompt_of(fast).grad = None
        if number in (99, 499):
            gc.collect()
            torch.cuda.synchronize()
            reserved.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert reserved[1][0] <= reserved[0][0] + 1024**2
    assert reserved[1][1] <= reserved[0][1] + 2 * 1024**2


@pytest.mark.gpu
def test_a_step_that_waits_is_refused_before_the_capture():
    """And leaves random generators, streams and the pool as they were."""
    _, waiting = models("llama", "cuda")
    mlp = waiting.get_base_model().model.layers[0].mlp

    class Waiting(type(mlp)):
        def forward(self, x):
            float(x.detach().sum())
            return super().forward(x)

    mlp.__class__ = Waiting
    batch = on("cuda", make_batch())
    waiting(**batch).loss.backward()
    with pytest.warns(UserWarning, match="makes the host wait for the device"):
        waiting(**batch).loss.backward()
    waiting(**batch).loss.backward()
    assert waiting._softprompt.runner.graphs.statistics.recorded == 0
    torch.rand(3, device="cuda")
    torch.cuda.synchronize()
    stock, fast = models("llama", "cuda")
    for _ in range(4):
        assert_close(step(fast, batch).loss, step(stock, batch).loss, 1e-5, "loss")
    assert fast._softprompt.runner.graphs.statistics.replayed >= 2


@pytest.mark.gpu
def test_cuda_graphs_of_a_compiler_leave_recorded_steps_their_memory():
    """A compiler that makes CUDA graphs forgets the workspaces of all products of matrices."""
    _, fast = models("bloom", "cuda", torch.bfloat16)
    batch = on("cuda", make_batch())
    for _ in range(4):
        expected = step(fast, batch)
    assert fast._softprompt.runner.graphs.statistics.replayed >= 2
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.zeros(1 << 20, device="cuda") for _ in range(256)]  # takes what was freed
    for _ in range(4):
        got = step(fast, batch)
        assert_close(got.loss, expected.loss, 1e-6, "loss")
        for key, grad in expected.grads.items():
            assert_close(got.grads[key], grad, 1e-6, key)
    assert not any(bool(tensor.any()) for tensor in others)


@pytest.mark.gpu
def test_two_models_and_two_streams_share_the_pool():
    pairs = [models(name, "cuda") for name in SHAPES]
    side = torch.cuda.Stream()
    for number, batch in enumerate(batches("cuda", 16)):
        for stock, fast in pairs:
            expected = step(stock, batch)
            torch.cuda.synchronize()
            with torch.cuda.stream(side if number % 3 == 2 else torch.cuda.current_stream()):
                got = step(fast, batch)
            torch.cuda.synchronize()
            assert_close(got.loss, expected.loss, 1e-5, "loss")
    for _, fast in pairs:
        assert fast._softprompt.runner.graphs.statistics.replayed > 5
