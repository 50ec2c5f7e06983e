"""Tiny random models in place of those that PEFT's tests load by name."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import peft.auto
import peft.utils.save_and_load
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer
from transformers.models.auto import modeling_auto

from softprompt.tiny import model_path

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_ENCODER = _SIZES | {"type_vocab_size": 2, "pad_token_id": 0}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 512,
}
# Part of a name in lower case -> (model type, configuration); the first that fits counts.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", _SIZES | {"ffn_dim": 37, "word_embed_proj_dim": 32}),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "gptneox": ("gpt_neox", _SIZES),
    "gpt2": ("gpt2", _GPT2),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("llama", _SIZES),
    "mistral": ("mistral", _SIZES),
    "qwen2": ("qwen2", _SIZES),
    "qwen3": ("qwen3", _SIZES | {"head_dim": 8}),
    "gemma3": ("gemma3_text", _SIZES | {"head_dim": 8, "sliding_window": 64}),
    "t5": ("t5", _T5),
    "bart": ("bart", _BART),
    "debertav2": ("deberta-v2", _ENCODER),
    "deberta": ("deberta", _ENCODER),
    "roberta": ("roberta", _ENCODER | {"pad_token_id": 1}),
    "bert": ("bert", _ENCODER),
}
_QUOTES = [f"A quote of {number} words is not always a long one." for number in range(24)]


class LocalModels:
    """Folders of random models, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.names: dict[str, int] = {}  # name -> times that it was loaded

    def folder(self, name: Any, auto_class: Any = None) -> Path | None:
        """The folder that stands in for a name, None where it is a folder itself or of no known kind."""
        if not isinstance(name, str) or Path(name).exists() or _kind(name) is None:
            return None
        kind = "config" if auto_class is None else auto_class.__name__
        folder = self._root / kind / name.replace("/", "--")
        if not folder.exists():
            self._make(folder, name, auto_class)
        self.names[name] = self.names.get(name, 0) + (auto_class is not None)
        return folder

    def _make(self, folder: Path, name: str, auto_class: Any) -> None:
        kind = _kind(name)
        assert kind is not None
        model_type, settings = ARCHITECTURES[kind]
        vocabulary = AutoConfig.from_pretrained(model_path()).vocab_size
        config = CONFIG_MAPPING[model_type](**settings, vocab_size=vocabulary)
        if auto_class is None:
            config.save_pretrained(folder)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                auto_class.from_config(config).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(model_path(), file), folder / file)


def _kind(name: str) -> str | None:
    last = name.rsplit("/", 1)[-1].lower()
    return next((kind for kind in ARCHITECTURES if kind in last), None)


def _answering(stock: Any, models: LocalModels, *, weights: bool) -> Any:
    """A `from_pretrained` of transformers that knows the local models."""

    @functools.wraps(stock.__func__)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        folder = models.folder(name, cls if weights else None)
        if folder is None:
            return stock.__func__(cls, name, *args, **kwargs)
        loaded = stock.__func__(cls, str(folder), *args, **kwargs)
        if hasattr(loaded, "config"):
            loaded.name_or_path = loaded.config._name_or_path = name
        return loaded

    return classmethod(from_pretrained)


# PEFT's tests import them at the top, for cases that are not about prompts.
_NOT_NEEDED = ("diffusers", "scipy")


class _Absent(types.ModuleType):
    """A module that is not installed: its names can be imported and not used."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        return _AbsentClass(name, (), {})


class _AbsentClass(type):
    """A class of such a module, whose attributes can be looked up and whose instances cannot be made."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AbsentClass(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ModuleNotFoundError(f"{cls.__name__} belongs to a module that is not installed")


def absent_modules() -> dict[str, types.ModuleType]:
    """Stand-ins for what PEFT's tests import and is not installed here."""
    made: dict[str, types.ModuleType] = {}
    for name in _NOT_NEEDED:
        if name.split(".")[0] in made or importlib.util.find_spec(name.split(".")[0]) is None:
            made[name] = _Absent(name)
            made[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
            made[name].__path__ = []
    return made


@contextlib.contextmanager
def local_models() -> Iterator[LocalModels]:
    """transformers, datasets and PEFT load by name what is made here, for the duration of a block."""

    def quotes(*args: Any, **kwargs: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"quote": _QUOTES}))

    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        models = LocalModels(Path(root))

        def exists(name: str, file: str, **kwargs: Any) -> bool:
            return models.folder(name) is not None

        auto_classes = [cls for cls in vars(modeling_auto).values() if hasattr(cls, "from_config")]
        owners = {next(c for c in cls.__mro__ if "from_pretrained" in vars(c)) for cls in auto_classes}
        for owner in owners:
            answer = _answering(owner.__dict__["from_pretrained"], models, weights=True)
            stack.enter_context(mock.patch.object(owner, "from_pretrained", answer))
        for owner in (AutoTokenizer, AutoConfig, transformers.PreTrainedConfig):
            answer = _answering(vars(owner)["from_pretrained"], models, weights=False)
            stack.enter_context(mock.patch.object(owner, "from_pretrained", answer))
        stack.enter_context(mock.patch.dict(sys.modules, absent_modules()))
        stack.enter_context(mock.patch.object(datasets, "load_dataset", quotes))
        for module in (peft.auto, peft.utils.save_and_load):
            stack.enter_context(mock.patch.object(module, "check_file_exists_on_hf_hub", exists))
        yield models
