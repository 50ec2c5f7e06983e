"""Where the soft prompts of a call start: PEFT's configurations, and the prompts of `--init`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import set_seed

from softprompt import init
from softprompt.cli.checks import UsageError, usage_errors
from softprompt.cli.gguf import files_of
from softprompt.cli.inputs import Setup
from softprompt.cli.models import patch
from softprompt.cli.training_config import TrainingConfig
from softprompt.engine.model_spec import config_of
from softprompt.prompts.adapters import INITIAL_PROMPT, prompt_parameter, read_npy, set_prompt
from softprompt.tasks.folders import adapter_folders

# Those that PEFT makes itself; the others replace its random prompt.
PEFT_INITS = {"text": "TEXT", "vocab": "SAMPLE_VOCAB", "random": "RANDOM"}


@dataclass(frozen=True, eq=False)
class Start:
    """Where one prompt starts.

    Attributes:
        adapter: the name of its adapter.
        seed: of what is drawn at random.
        config: PEFT's.
        prompt: [P, H], None where PEFT makes it.
    """

    adapter: str
    seed: int
    config: PromptTuningConfig
    prompt: Tensor | None


def prompt_starts(
    setup: Setup,
    config: TrainingConfig,
    adapters: Sequence[str],
    *,
    checkpoint: Path | None = None,
) -> list[Start]:
    """Return where the prompts of one run start, or of the interrupted run that `checkpoint` is from.

    Raises:
        UsageError: a prompt does not fit the model, or cannot be made, with the reason.
    """
    tokenizer = setup.encoder.tokenizer
    positions = getattr(setup.base.config.get_text_config(), "max_position_embeddings", None)
    max_length = setup.encoder.task.max_length
    if positions is not None and config.num_virtual_tokens + max_length > positions:
        raise UsageError(
            f"--num-virtual-tokens {config.num_virtual_tokens} and --max-length {max_length} together "
            f"exceed the {positions} positions of {setup.model_name}: make one of them smaller"
        )
    if config.start == "text" and config.init_text and not tokenizer(config.init_text)["input_ids"]:
        raise UsageError(f"--init-text {config.init_text!r} has no tokens: give other words")
    for words in config.ensemble_texts or []:
        if not tokenizer(words)["input_ids"]:
            raise UsageError(f"--ensemble-texts {words!r} has no tokens: give other words")
    prompts = _saved_starts(checkpoint) or [
        _initial_prompt(setup, config, number, len(adapters)) for number in range(len(adapters))
    ]
    starts = []
    for number, (adapter, prompt) in enumerate(zip(adapters, prompts, strict=True)):
        texts = config.ensemble_texts or [config.init_text or ""]
        text = texts[number] if config.start == "text" and number < len(texts) else None
        # The same words again would give the same prompt again.
        kind = "vocab" if config.start == "text" and text is None else config.start
        peft_config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            # PEFT asks for them and prompts do not use them: Mamba has none.
            num_attention_heads=getattr(config_of(setup.base), "num_attention_heads", 1),
            prompt_tuning_init=PEFT_INITS.get(kind, "RANDOM"),
            prompt_tuning_init_text=text,
            **({} if text is None else _tokenizer_of(setup.model_name)),
        )
        starts.append(Start(adapter, config.seed + number, peft_config, prompt))
    return starts


def _tokenizer_of(model: str) -> dict[str, Any]:
    """Where PEFT finds the tokenizer for the words."""
    files, arguments = files_of(model)
    return {"tokenizer_name_or_path": files, "tokenizer_kwargs": arguments or None}


def with_prompts(setup: Setup, starts: Sequence[Start]) -> Any:
    """Return the model with an adapter for each start, patched unless `--no-patch` was given."""
    model: Any = None
    for start in starts:
        set_seed(start.seed)
        if model is None:
            model = get_peft_model(setup.base, start.config, adapter_name=start.adapter)
        else:
            model.add_adapter(start.adapter, start.config)
        if start.prompt is not None:
            set_prompt(model, start.prompt, start.adapter)
    return patch(model, positions=setup.encoder.task.positions, no_patch=setup.config.compute.no_patch)


def check_different(config: TrainingConfig, model: Any) -> None:
    """Raise UsageError where two prompts of an ensemble start at the same place, and so end there too."""
    found: dict[bytes, str] = {}
    for name in model.peft_config:
        other = found.setdefault(prompt_parameter(model, name).detach().cpu().numpy().tobytes(), name)
        if other != name:
            raise UsageError(
                f"--init {config.start}: {other} and {name} of the ensemble start at the same numbers and "
                "would stay the same: give more --num-virtual-tokens, or another --init"
            )


def _initial_prompt(setup: Setup, config: TrainingConfig, number: int, count: int) -> Tensor | None:
    """The [P, H] prompt of `--init` with this number of the `count`, None where PEFT makes it."""
    model, length, seed = setup.base, config.num_virtual_tokens, config.seed + number
    tokenizer, table = setup.encoder.tokenizer, setup.train_table
    with usage_errors(f"--init {config.start}: "):
        match config.start:
            case "answers":
                answers = [setup.encoder.answer(label) for label in setup.encoder.task.labels]
                return init.answers(model, length, answers, order=None if number == 0 else seed)
            case "label-words":
                labels, order = table.known_labels(), None if number == 0 else seed
                return init.label_words(model, length, tokenizer, labels, order=order)
            case "text-once":
                return init.text(model, length, tokenizer, config.init_text or "", tile=False, seed=seed)
            case "labels":
                return init.class_labels(model, length, tokenizer, table.known_labels(), seed=seed)
            case "common":
                return init.common_tokens(model, length, seed=seed)
            case "counted":
                counts = init.count_tokens(model, tokenizer, table.texts)
                return init.common_tokens(model, length, counts=counts, seed=seed)
            case "matched":
                return init.matched(model, length, seed=seed)
            case "uniform":
                return init.uniform(model, length, seed=seed)
            case "saved":
                return _saved(config, model, number, count)
    return None


def _saved(config: TrainingConfig, model: Any, number: int, count: int) -> Tensor:
    """The prompt that `--init-from` names, from an ensemble the one with this number."""
    length, source = config.num_virtual_tokens, Path(config.init_from or "")
    if not source.is_dir():
        return init.from_file(model, source, num_virtual_tokens=length)
    folders = adapter_folders(source)
    if len(folders) > 1 and len(folders) != count:
        raise ValueError(
            f"{source} holds an ensemble of {len(folders)} prompts, and prompts to train: {count}; give "
            f"--ensemble {len(folders)}, or the folder of one of them"
        )
    folder = folders[number] if len(folders) > 1 else source
    return init.from_adapter(model, folder, num_virtual_tokens=length, other_base=config.init_other_base)


def _saved_starts(checkpoint: Path | None) -> list[Tensor | None]:
    """The initial prompts of an interrupted run: what they were made from may have gone since."""
    folders = [] if checkpoint is None else adapter_folders(checkpoint)
    files = [folder / INITIAL_PROMPT for folder in folders]
    if not all(path.is_file() for path in files):
        return []
    with usage_errors("--resume: "):
        starts: list[Tensor | None] = [read_npy(path) for path in files]
    return starts
