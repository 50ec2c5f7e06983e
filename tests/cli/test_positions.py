"""Whether pads count for the positions that a prompt is trained at."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import softprompt


@pytest.fixture(scope="module")
def llama_folder(model_folder, tmp_path_factory):
    """A model that counts pads, with the tokenizer of the other one."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def train(run, table, tmp_path):
    def call(model, *more, output="out"):
        code, _, err = run(
            *("train", "--data", table, "--model", model, "--output", tmp_path / output),
            *("--epochs", 1, "--eval-share", 0, *more),
        )
        return code, err

    return call


@pytest.mark.slow
def test_padding_does_not_matter_unless_pads_count(train, llama_folder, tmp_path, read_json):
    prompts = {}
    for positions in ((), ("--positions", "padded")):
        for padding in ("max_length", "longest"):
            name = f"{len(positions)}-{padding}"
            assert (
                train(llama_folder, "--padding", padding, "--batch-size", 8, *positions, output=name)[0] == 0
            )
            prompts[len(positions), padding] = load_file(tmp_path / name / "adapter_model.safetensors")[
                "prompt_embeddings"
            ]
            task = read_json(tmp_path / name / "softprompt.json")
            assert task["positions"] == ("padded" if positions else "compact")
    torch.testing.assert_close(prompts[0, "max_length"], prompts[0, "longest"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prompts[2, "max_length"], prompts[2, "longest"], rtol=1e-4, atol=1e-5)


def test_plain_peft_counts_pads(train, model_folder, tmp_path, read_json):
    assert train(model_folder, "--no-patch")[0] == 0
    assert read_json(tmp_path / "out" / "softprompt.json")["positions"] == "padded"


def test_a_model_that_cannot_be_packed_counts_pads_and_says_so(train, unpacked_folder, tmp_path, read_json):
    code, err = train(unpacked_folder)
    assert code == 0
    assert "softprompt: pads count for positions (--positions padded): rows stay padded" in err
    assert read_json(tmp_path / "out" / "softprompt.json")["positions"] == "padded"


def test_a_model_without_attention_heads_trains_and_labels(train, run, model_folder, table, tmp_path):
    folder = tmp_path / "mamba"
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1)).save_pretrained(folder)
    assert train(folder)[0] == 0
    output = tmp_path / "labelled.csv"
    assert run("predict", "--adapter", tmp_path / "out", "--data", table, "--output", output)[0] == 0
    assert output.read_text().count("complaint") >= 40


def test_compact_positions_that_cannot_be_had_are_one_line(train, model_folder, unpacked_folder):
    code, err = train(model_folder, "--no-patch", "--positions", "compact")
    assert code == 2
    assert err == "softprompt: --positions compact needs softprompt's path: leave --no-patch out\n"
    code, err = train(unpacked_folder, "--positions", "compact")
    assert code == 2
    assert "--positions compact cannot be had for this model: rows stay padded" in err
    assert err.count("\n") == 1


def test_labels_are_written_for_rows_without_padding(llama_folder):
    from peft import PromptTuningConfig, get_peft_model

    from softprompt.tasks.classification import Encoder, TextTask
    from softprompt.tasks.inference import label_texts

    texts = ["my order never came", "a", "thanks for the quick help", "b", "see you at the game", "order it"]
    torch.manual_seed(3)
    base = LlamaForCausalLM.from_pretrained(llama_folder)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    answers = {}

    def encoder_of(positions):
        task = TextTask("text", "Label", ("complaint", "no complaint"), positions=positions)
        return Encoder(task, tokenizer)

    for positions in ("compact", "padded"):
        encoder = encoder_of(positions)
        answers[positions] = label_texts(model, encoder, texts, batch_size=4)
    alone = [
        encoder.decode(
            model.generate(
                input_ids=torch.tensor([encoder.prompt(text)]),
                attention_mask=torch.ones(1, len(encoder.prompt(text)), dtype=torch.int64),
                max_new_tokens=encoder.max_target,
                do_sample=False,
                use_cache=False,  # with one, PEFT is not right with every transformers
                eos_token_id=encoder.stop_token_ids,
                pad_token_id=encoder.pad_token_id,
            )[0, len(encoder.prompt(text)) :].tolist()
        )
        for text in texts
    ]
    assert answers["compact"] == alone
    assert answers["padded"] != alone
    widths = []
    with softprompt.patched(model, positions="compact"):
        generate = model.generate
        model.generate = lambda **inputs: widths.append(inputs["input_ids"].shape) or generate(**inputs)
        assert label_texts(model, encoder_of("compact"), texts, batch_size=4) == alone
        del model.generate
    assert [shape[0] for shape in widths] == [4, 2]
