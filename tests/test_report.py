"""`explain` says which route a model takes and why, and what would be faster."""

import pytest
from parity import make_batch
from sharded_models import replica
from tiny_models import prompted
from torch import nn

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


@pytest.mark.parametrize(
    "module, where", [(nn.Linear(2, 2), "(torch.float32, cpu)"), (nn.Identity(), "(cpu)")]
)
def test_explain_names_what_is_no_language_model(module, where):
    report = softprompt.explain(module)
    assert report.model == f"{type(module).__name__} {where}"
    assert (report.route, report.reason) == ("stock", f"{type(module).__name__} is not a transformers model")


def test_explain_names_what_copies_the_model():
    model = softprompt.patch(prompted("llama"))
    report = softprompt.explain(replica(model))
    assert report.route == "stock"
    assert "nn.DataParallel copies the model in every step" in report.reason


def test_explain_names_a_model_without_input_embeddings_also_behind_peft():
    model = prompted("llama")
    base = model.get_base_model()
    base.get_input_embeddings = lambda: None
    assert "the model names no input embeddings" in str(softprompt.explain(base))
    assert "PEFT embeds tokens with another module" in str(softprompt.explain(model))


def test_explain_of_what_is_no_model_is_a_clear_error():
    with pytest.raises(TypeError, match=r"softprompt\.explain takes a model, got str"):
        softprompt.explain("llama")
