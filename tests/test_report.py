"""`explain` says which route a model takes and why, and what would be faster."""

from parity import make_batch
from tiny_models import prompted

import softprompt


def test_explain_names_the_route_before_and_after_patching():
    routes = {}
    for name in ("llama", "bloom", "gptj", "falcon", "gemma", "recurrent_gemma", "mamba"):
        model = prompted(name)
        before = softprompt.explain(model)
        assert not before.patched
        assert "not patched" in str(before)
        after = softprompt.explain(softprompt.patch(model))
        assert after.patched
        assert "not patched" not in str(after)
        assert after.route == before.route
        assert f"route: {after.route}" in str(after)
        routes[name] = (after.route, dict(after.details)["attention"])
        assert softprompt.explain(model.get_base_model()).route == after.route
    assert routes == {
        "llama": ("packed", "interface seam"),
        "bloom": ("packed", "bloom seam"),
        "gptj": ("packed", "mask seam"),
        "falcon": ("packed", "falcon seam"),
        "gemma": ("packed", "interface seam"),
        "recurrent_gemma": ("padded", "the model's own"),
        "mamba": ("padded", "the model's own"),
    }


def test_explain_says_what_would_be_faster():
    model = prompted("gptj", attn_pdrop=0.1)
    model.get_base_model().gradient_checkpointing_enable()
    model.train()
    text = str(softprompt.explain(model))
    for part in ("AttentionInterface", "no gradient checkpointing", "dropout off", "p=0.1"):
        assert part in text


def test_explain_knows_an_embedding_and_a_head_that_have_to_be_called():
    model = prompted("gemma")
    details = dict(softprompt.explain(model).details)
    assert "called as a module" in details["embedding"]
    assert details["head"].startswith("fused")
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: output)
    details = dict(softprompt.explain(model).details)
    assert details["head"] == "the model's own head on label rows: the head has hooks"


def test_explain_counts_recorded_steps_and_says_why_there_are_none(tape):
    model = softprompt.patch(prompted("llama"))
    assert dict(softprompt.explain(model).details)["step graph"] == "no training step yet"
    for _ in range(5):
        model(**make_batch()).loss.backward()
    assert (
        dict(softprompt.explain(model).details)["step graph"]
        == "1 recorded, 4 steps replayed, 1 not yet worth it"
    )
    softprompt.patch(model, cuda_graphs=False)
    assert "off" in dict(softprompt.explain(model).details)["step graph"]


def test_explain_says_that_graphs_need_a_gpu():
    model = softprompt.patch(prompted("llama"))
    model(**make_batch()).loss.backward()
    assert "no: CUDA graphs need a CUDA device" in dict(softprompt.explain(model).details)["step graph"]


def test_the_report_says_how_generate_is_served():
    said = {
        name: dict(softprompt.explain(softprompt.patch(prompted(name))).details)["generate"]
        for name in ("llama", "gptj", "mamba")
    }
    assert said["llama"] == "each prompt is computed once and kept, texts are packed"
    assert "texts stay padded" in said["gptj"]
    assert said["mamba"].startswith("PEFT's own: ")
    assert "recurrent state" in said["mamba"]


def test_the_report_says_why_an_adapter_generates_with_pefts_own():
    model = prompted("llama")
    model.peft_config["default"].num_transformer_submodules = 2
    assert "submodules" in dict(softprompt.explain(model).details)["generate"]
