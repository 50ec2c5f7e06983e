"""--model FILE.gguf: trained, predicted, inspected, exported; converted once, refused in one line."""

import json
import os
import warnings

import pytest
import torch
from gguf_files import write_gguf
from peft import AutoPeftModelForCausalLM, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import softprompt
from softprompt.cli import checks, gguf, main
from softprompt.cli.checks import UsageError, check_model
from softprompt.cli.models import load_model, load_tokenizer

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install '.[real]'")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.Q8_0.gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(gguf.CACHE_VARIABLE, str(folder))
    gguf._converted.cache_clear()
    yield folder
    gguf._converted.cache_clear()


def folders(cache):
    return [path for path in cache.iterdir() if path.is_dir()]


def train(file, table, output, *more):
    places = ["--data", str(table), "--model", str(file), "--output", str(output)]
    columns = ["--text-column", "Tweet text", "--label-column", "Label"]
    words = ["--init-text", "Classify if the tweet is a complaint or not:"]
    return main(["train", *places, *columns, *words, "--steps", "2", *more])


def test_the_commands_take_a_file_and_convert_it_once(file, cache, table, tmp_path, capsys):
    output = tmp_path / "adapter"
    assert train(file, table, output) == 0
    assert capsys.readouterr().err.count("was converted into") == 1
    (plain,) = folders(cache)
    assert json.loads((output / "softprompt.json").read_text())["model"] == str(file)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == config["tokenizer_name_or_path"] == str(plain)
    assert AutoPeftModelForCausalLM.from_pretrained(str(output)).base_model.dtype == torch.float32

    gguf._converted.cache_clear()
    adapter = ["--adapter", str(output)]
    labelled = tmp_path / "labelled.csv"
    assert main(["predict", *adapter, "--data", str(table), "--output", str(labelled)]) == 0
    assert main(["inspect", *adapter, "--output", str(tmp_path / "inspection")]) == 0
    exported = ["--format", "peft", "--output", str(tmp_path / "exported")]
    assert main(["export", *adapter, "--model", str(file), *exported]) == 0
    assert "converted" not in capsys.readouterr().err
    assert folders(cache) == [plain]


def test_nothing_is_kept_where_that_is_turned_off(file, table, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(gguf.CACHE_VARIABLE, "off")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    output = tmp_path / "adapter"
    assert train(file, table, output) == 0
    assert "converted" not in capsys.readouterr().err
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(file.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoPeftModelForCausalLM.from_pretrained(str(output), gguf_file=file.name)
    labelled = tmp_path / "labelled.csv"
    assert main(["predict", "--adapter", str(output), "--data", str(table), "--output", str(labelled)]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_and_its_conversion_are_the_same_model(file, cache, monkeypatch, dtype):
    converted, words = load_model(str(file), dtype), load_tokenizer(str(file))
    monkeypatch.setenv(gguf.CACHE_VARIABLE, "off")
    direct, same_words = load_model(str(file), dtype), load_tokenizer(str(file))
    for (name, first), (other, second) in zip(
        converted.state_dict().items(), direct.state_dict().items(), strict=True
    ):
        assert name == other
        assert first.dtype == second.dtype == dtype
        assert torch.equal(first, second)
    text = "the other <s> thing"
    assert words(text)["input_ids"] == same_words(text)["input_ids"]
    for model in (converted, direct):
        assert not hasattr(model.config, "quantization_config")
        assert not getattr(model, "is_quantized", False)


def test_a_file_read_directly_is_packed_and_saved_as_any_other_model(file, monkeypatch, tmp_path):
    monkeypatch.setenv(gguf.CACHE_VARIABLE, "off")
    base = load_model(str(file), torch.float32)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = softprompt.patch(get_peft_model(base, config))
    assert softprompt.explain(model).route == "packed"
    base.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    expected = load_model(str(file), torch.float32)
    for first, second in zip(expected.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


def test_another_file_under_the_same_name_is_converted_anew(cache, tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    before = load_model(str(file), torch.float32).get_input_embeddings().weight
    write_gguf(file, seed=1)
    os.utime(file, ns=(1, 1))
    after = load_model(str(file), torch.float32).get_input_embeddings().weight
    assert not torch.equal(before, after)
    assert len(folders(cache)) == 2


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(file, cache, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_model(str(file), torch.float32)
    assert folders(cache) == []
    load_model(str(file), torch.float32)
    assert len(folders(cache)) == 1


def test_where_nothing_can_be_written_the_file_is_read_and_a_line_says_so(
    file, tmp_path, monkeypatch, capsys
):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv(gguf.CACHE_VARIABLE, str(tmp_path / "taken"))
    gguf._converted.cache_clear()
    load_model(str(file), torch.float32)
    load_tokenizer(str(file))
    assert capsys.readouterr().err.count("is read anew in each run") == 1


def test_the_cache_lies_where_the_hub_library_keeps_its_files(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv(gguf.CACHE_VARIABLE, raising=False)
    assert gguf.cache_folder().parent.parent == type(gguf.cache_folder())(constants.HF_HOME)


def test_what_is_not_there_or_no_gguf_file_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, file):
    with pytest.raises(UsageError, match="is not there: give a GGUF file"):
        check_model(str(tmp_path / "none.gguf"))
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(UsageError, match=r"is no GGUF file: it starts with b'<htm'"):
        check_model(str(tmp_path / "page.gguf"))
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package gguf: run pip install '\.\[real\]'"):
        check_model(str(file))


def test_a_link_to_a_file_keeps_its_name(file, tmp_path, monkeypatch):
    (tmp_path / "blob").write_bytes(file.read_bytes())
    (tmp_path / "linked.gguf").symlink_to(tmp_path / "blob")
    monkeypatch.chdir(tmp_path)
    assert check_model("linked.gguf") == str(tmp_path / "linked.gguf")


@pytest.mark.parametrize("share", [0.001, 0.2, 0.9])
def test_a_file_that_is_cut_short_is_refused(file, cache, tmp_path, share):
    content = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: max(4, int(share * len(content)))])
    with pytest.raises(UsageError, match=r"cannot load the model .*cut\.gguf: \S"):
        load_model(str(tmp_path / "cut.gguf"), torch.float32)
    assert folders(cache) == []


def test_an_unknown_architecture_is_refused_by_name(cache, tmp_path):
    file = write_gguf(tmp_path / "other.gguf", architecture="unheard")
    with pytest.raises(UsageError, match="architecture unheard is not supported"):
        load_model(str(file), torch.float32)


def test_a_part_of_a_split_model_is_refused(cache, tmp_path):
    file = write_gguf(tmp_path / "part.gguf", without="blk.1.")
    with pytest.raises(UsageError, match="of its tensors are not in the file"):
        load_model(str(file), torch.float32)
