import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from softprompt import export, init
from softprompt.prompts.adapters import read_prompt


@pytest.fixture
def adapter(tiny, tmp_path):
    """A folder as PEFT writes it, and the prompt in it."""
    model = get_peft_model(
        copy.deepcopy(tiny), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", init.prompt_parameter(model).detach()


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_prompt_of_an_adapter_folder_is_bit_equal(tiny, adapter):
    folder, prompt = adapter
    assert torch.equal(init.from_adapter(tiny, folder), prompt)
    assert torch.equal(read_prompt(folder), prompt)


def test_the_older_file_format_of_peft_is_read(tiny, adapter):
    folder, prompt = adapter
    torch.save({"prompt_embeddings": prompt}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert torch.equal(init.from_adapter(tiny, folder), prompt)


def test_a_saved_array_comes_back_bit_equal(tiny, adapter, tmp_path):
    export.save_npy(adapter[1], tmp_path / "prompt.npy")
    assert torch.equal(init.from_file(tiny, tmp_path / "prompt.npy"), adapter[1])
    assert np.load(tmp_path / "prompt.npy").dtype == np.float32
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_an_array_of_doubles_is_read_as_float32(tiny, tmp_path):
    np.save(tmp_path / "prompt.npy", np.full((2, 128), 0.1))
    assert torch.equal(init.from_file(tiny, tmp_path / "prompt.npy"), torch.full((2, 128), 0.1))


def test_an_adapter_of_another_base_is_refused_unless_allowed(tiny, adapter):
    folder, prompt = adapter
    change_config(folder, base_model_name_or_path="someone/other-model")
    with pytest.raises(ValueError, match="was trained for the model someone/other-model, not for"):
        init.from_adapter(tiny, folder)
    assert torch.equal(init.from_adapter(tiny, folder, other_base=True), prompt)


def test_a_copy_of_the_base_in_another_place_is_the_same_base(tiny, adapter):
    folder, prompt = adapter
    change_config(folder, base_model_name_or_path="someone/" + tiny.name_or_path.rsplit("/", 1)[-1])
    assert torch.equal(init.from_adapter(tiny, folder), prompt)


def test_an_adapter_of_another_width_is_refused(models, adapter):
    with pytest.raises(ValueError, match=r"adapter in .* is 128 numbers wide, the model's tokens 48"):
        init.from_adapter(models["llama"], adapter[0])


class Pickled:
    def __reduce__(self):
        return (pytest.fail, ("a pickled object was run",))


def write(path, array, **options):
    np.save(path, array, **options)
    return path


def with_bytes(path, content):
    path.write_bytes(content)
    return path


def header(shape):
    text = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


BAD_FILES = {
    "missing": (
        lambda folder: folder / "none.npy",
        "none.npy does not exist: give a .npy file or an adapter",
    ),
    "pickled": (
        lambda folder: write(folder / "p.npy", np.array([Pickled()]), allow_pickle=True),
        "is not a readable .npy file without pickled objects",
    ),
    "garbage": (
        lambda folder: folder / "garbage.npy",
        "garbage.npy is not a readable .npy file without pickled objects",
    ),
    "a broken archive": (
        lambda folder: with_bytes(folder / "p.npy", b"PK\x03\x04 and no more"),
        "p.npy is not a readable .npy file without pickled objects",
    ),
    "an open header": (
        lambda folder: with_bytes(folder / "p.npy", b"\x93NUMPY\x01\x00\x0a\x00{'descr': ("),
        "p.npy is not a readable .npy file without pickled objects",
    ),
    "more numbers than any memory": (
        lambda folder: with_bytes(folder / "p.npy", header((10**12, 10**6))),
        "p.npy is not a readable .npy file without pickled objects",
    ),
    "three dimensions": (
        lambda folder: write(folder / "p.npy", np.zeros((1, 2, 3))),
        "must hold floating-point numbers of shape [P, H], got float64 of shape [1, 2, 3]",
    ),
    "whole numbers": (
        lambda folder: write(folder / "p.npy", np.zeros((2, 128), dtype=np.int64)),
        "must hold floating-point numbers of shape [P, H], got int64 of shape [2, 128]",
    ),
    "another width": (
        lambda folder: write(folder / "p.npy", np.zeros((2, 3))),
        "p.npy is 3 numbers wide, the model's tokens 128",
    ),
    "no rows": (
        lambda folder: write(folder / "p.npy", np.zeros((0, 128))),
        "p.npy has 0 virtual tokens, expected one or more",
    ),
    "several arrays": (lambda folder: folder / "several.npz", "several.npz holds several arrays (.npz)"),
}


@pytest.mark.parametrize("make, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_said_in_one_sentence(tiny, tmp_path, make, message):
    (tmp_path / "garbage.npy").write_bytes(b"\x93NUMPY and then nothing of the kind")
    np.savez(tmp_path / "several.npz", a=np.zeros(2))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        init.from_file(tiny, make(tmp_path))
    assert message in str(caught.value)


def lora(folder, tiny):
    get_peft_model(copy.deepcopy(tiny), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)


BAD_FOLDERS = {
    "empty": (lambda folder, tiny: None, "holds no adapter: expected a folder with adapter_config.json"),
    "no weights": (
        lambda folder, tiny: (folder / "adapter_config.json").write_text("{}"),
        "has no weights: expected adapter_model.safetensors or adapter_model.bin",
    ),
    "another type": (lora, "is of type LORA, expected PROMPT_TUNING"),
    "broken config": (
        lambda folder, tiny: [(folder / name).write_text("{") for name in FILES],
        "cannot be read",
    ),
    "broken weights": (
        lambda folder, tiny: [(folder / name).write_text(CONFIG) for name in FILES],
        "cannot be read",
    ),
    "pickled weights": (
        lambda folder, tiny: [
            (folder / "adapter_config.json").write_text(CONFIG),
            torch.save({"prompt_embeddings": Pickled()}, folder / "adapter_model.bin"),
        ],
        "cannot be read",
    ),
    "another length": (
        lambda folder, tiny: [
            (folder / "adapter_config.json").write_text(CONFIG),
            torch.save({"prompt_embeddings": torch.zeros(3, 128)}, folder / "adapter_model.bin"),
        ],
        "has 3 virtual tokens, its configuration says 2",
    ),
    "other weights": (
        lambda folder, tiny: [
            (folder / "adapter_config.json").write_text(CONFIG),
            torch.save({"something": torch.zeros(2, 128)}, folder / "adapter_model.bin"),
        ],
        "has no floating-point prompt_embeddings of shape [P, H]",
    ),
}
FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG = json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2})


@pytest.mark.parametrize("fill, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_is_said_in_one_sentence(tiny, tmp_path, fill, message):
    fill(tmp_path, tiny)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        init.from_adapter(tiny, tmp_path)
    assert message in str(caught.value)
