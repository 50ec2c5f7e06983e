"""A decoder under torch.compile inside packed calls: right numbers, nothing compiled anew for a new batch."""

import pytest
import torch
from parity import assert_close, make_batch
from tiny_models import WINDOW, build

from softprompt.engine import model_spec
from softprompt.engine.batch import check_batch
from softprompt.engine.plan import make_plan

pytestmark = pytest.mark.slow(seconds=20)

LAYERS = 10  # more than the compiler's limit of 8 recompilations of one function
NUM_LAYERS = {
    "bloom": {"n_layer": LAYERS},
    "gpt2": {"n_layer": LAYERS},
    "mpt": {"n_layers": LAYERS},
    "gpt_neo": {"num_layers": LAYERS, "attention_types": [[["global", "local"], LAYERS // 2]]},
    "gemma2": {
        "num_hidden_layers": LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "sliding_window": WINDOW,
    },
}
# Two numbers of packed tokens, so that the second makes sizes symbolic; then new layouts of known sizes.
FIRST = [((7, 3, 5), "left"), ((30, 12), "left"), ((9, 9, 9, 5), "right")]
LATER = [
    ((6, 6, 3), "right"),
    ((5, 7, 3), "left"),
    ((8, 20, 1), "right"),
    ((9, 2, 1), "left"),
    ((14, 14), "right"),
]


def run(model, plan, prompt, lengths, side, call_body):
    given = make_batch(lengths, side, "everywhere", seed=sum(lengths))
    batch = check_batch([prompt], prompt.shape[1], inputs_embeds=None, prompt_of_row=None, **given)
    layout = plan.layout(batch, token_bucket=16)
    hidden = plan.decode(model, batch, layout, call_body=call_body).hidden
    return hidden.detach(), torch.autograd.grad(hidden.square().sum(), prompt)[0]


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "aot_eager") for name in ("bloom", "llama", "gpt2", "gemma2", "mpt", "gpt_neo", "falcon")]
    + [("bloom", "inductor")],
)
def test_a_compiled_decoder_gives_the_plain_ones_numbers_and_compiles_nothing_for_a_new_batch(name, backend):
    torch._dynamo.reset()
    model = build(name, torch.float32, **NUM_LAYERS.get(name, {"num_hidden_layers": LAYERS}))
    plan = make_plan(model)
    assert plan.route == "packed"
    compiled = torch.compile(model_spec.body_of(model), backend=backend)
    prompt = torch.randn(4, model.get_input_embeddings().embedding_dim, requires_grad=True)

    def compare(batches):
        for lengths, side in batches:
            # A plain function, since the truth value of a compiled module is asked of its length.
            got = run(model, plan, prompt, lengths, side, lambda **kwargs: compiled(**kwargs))
            expected = run(model, plan, prompt, lengths, side, None)
            assert_close(got[0], expected[0], 1e-5, f"hidden rows of {lengths}")
            assert_close(got[1], expected[1], 1e-4, f"prompt gradient of {lengths}")

    compare(FIRST)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(LATER)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["recompile_limit"]
