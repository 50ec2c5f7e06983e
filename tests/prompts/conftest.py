"""The shipped model, and small models that scale their embeddings in different places."""

import pytest
import torch
from tiny_models import build
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt.tiny import model_path


@pytest.fixture(scope="session")
def tiny():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="session")
def models():
    """Gemma scales inside its embedding module, granite and bloom after it, llama nowhere."""
    return {name: build(name, torch.float32) for name in ("llama", "gemma", "granite", "bloom")}


@pytest.fixture(scope="session")
def table_of():
    """The whole vocabulary through the embedding module at once: [V, H] fp32."""

    def table(model):
        embedding = model.get_input_embeddings()
        return embedding(torch.arange(embedding.num_embeddings)).detach().float()

    return table
