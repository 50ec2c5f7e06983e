"""`softprompt export`: a trained prompt for other programs."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.cli.checks import (
    UsageError,
    check_inputs,
    check_new,
    check_output_file,
    check_output_folder,
    check_prompt_option,
    usage_errors,
)
from softprompt.cli.options import (
    Command,
    PromptOptions,
    flag,
    given,
    nested,
    option,
    option_name,
    whole,
    words,
)
from softprompt.tasks.folders import holds_adapter

if TYPE_CHECKING:
    from softprompt.cli.models import SavedPrompt

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The options of `softprompt export`."""

    prompt: PromptOptions = nested(PromptOptions)
    format: str = option(
        "npy: an array [P, H] of float32; peft: a folder with PEFT's two adapter files; vllm: a request with "
        "the vectors of prompt and text in the place of the text",
        required=True,
        choices=("npy", "vllm", "peft"),
    )
    output: str = option(
        "what to write: a .npy file, a folder for peft, and for vllm a .json file with the body of a request "
        "to /v1/completions or a .pt file with the tensor alone",
        given,
        "PATH",
        required=True,
    )
    overwrite: bool = flag("replace what --output names if it is there")
    text: str | None = option(
        "the text to answer; an adapter of `softprompt train` puts it into the template of its training",
        words,
        group="--format vllm",
    )
    served_model: str | None = option(
        "the name of the model on the server (default: the name of --model)", given, "NAME"
    )
    max_tokens: int | None = option(
        f"longest answer in tokens (default: that of the longest label or target, or {DEFAULT_MAX_TOKENS})",
        whole(1),
        "N",
    )


COMMAND = Command(
    ExportConfig,
    summary="write a trained soft prompt for other programs",
    description="Write a soft prompt as a .npy array, as an adapter folder of PEFT, or, together with a "
    "text, as a request that a vLLM server answers.",
    example="softprompt export --adapter softprompt-output --format vllm \\\n"
    '      --text "my order never came" --output request.json',
)


def run(config: ExportConfig) -> int:
    """Check what was asked, read the prompt, write the file or the folder."""
    output, adapter, model = Path(config.output), config.prompt.adapter, config.prompt.model
    _check(config)
    check_prompt_option("--adapter", adapter)
    check_inputs(model=model)

    from softprompt import export
    from softprompt.cli.models import load_base, open_prompt, quiet_libraries
    from softprompt.prompts.export import write_adapter

    quiet_libraries()
    saved = open_prompt(adapter, model)
    if saved.config is not None and saved.config.modules_to_save:
        raise UsageError(
            f"{saved.source} holds trained modules of the model beside the prompt "
            f"({', '.join(saved.config.modules_to_save)}): without them the prompt gives other answers"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    if config.format == "npy":
        export.save_npy(saved.prompt, output)
    elif config.format == "vllm":
        return _write_request(config, saved, config.text or "", output)
    elif saved.config is not None and model is None:
        write_adapter(saved.config, saved.prompt, output)
    else:
        base, _ = load_base(saved)
        export.save_peft(base, saved.prompt, output)
    print(f"{len(saved.prompt)} virtual tokens of {saved.prompt.shape[1]} numbers: {output}")
    return 0


def _check(config: ExportConfig) -> None:
    output = Path(config.output)
    endings = {"npy": (".npy",), "vllm": (".json", ".pt"), "peft": ()}[config.format]
    if endings and output.suffix not in endings:
        raise UsageError(f"--format {config.format} writes {' or '.join(endings)}: rename --output {output}")
    if config.format != "peft":
        check_new(check_output_file(config.output), overwrite=config.overwrite)
    elif holds_adapter(check_output_folder(config.output)):
        check_new(output, overwrite=config.overwrite)
    if config.format == "vllm":
        if config.text is None:
            raise UsageError("--format vllm needs the text that stands behind the prompt: give --text")
        return
    for name in ("text", "served_model", "max_tokens"):
        if getattr(config, name) is not None:
            raise UsageError(f"{option_name(name)} belongs to --format vllm, not {config.format}")


def _write_request(config: ExportConfig, saved: "SavedPrompt", text: str, output: Path) -> int:
    from softprompt import export
    from softprompt.cli.models import load_base, load_tokenizer
    from softprompt.files import write_text
    from softprompt.tasks.classification import Encoder

    base, name = load_base(saved)
    tokenizer = load_tokenizer(name)
    stops: list[int] = []
    longest = DEFAULT_MAX_TOKENS
    if saved.task is None:
        ids = tokenizer(text)["input_ids"]
    else:
        if saved.task.columns:
            raise UsageError(
                f"the template of {saved.source} reads {', '.join(map(repr, saved.task.columns))} beside the "
                "text, and --text is one text: export --format npy, and fill the template in where rows are"
            )
        encoder = Encoder(saved.task, tokenizer)
        ids, stops, longest = encoder.prompt(text), encoder.stop_token_ids, encoder.max_target
    with usage_errors():
        embeds = export.prompt_embeds(base, ids, saved.prompt)
    if output.suffix == ".pt":
        export.save_tensor(embeds, output)
    else:
        body = export.completion_request(
            config.served_model or name,
            embeds,
            max_tokens=config.max_tokens or longest,
            stop_token_ids=stops,
        )
        write_text(output, json.dumps(body) + "\n")
    tokens = f"{len(saved.prompt)} virtual and {len(ids)} text tokens"
    print(f"{tokens}, {list(embeds.shape)} of {str(embeds.dtype).removeprefix('torch.')}: {output}")
    if output.suffix == ".json":
        data = shlex.quote(f"@{output}")
        print(f"send it: curl URL/v1/completions -H 'Content-Type: application/json' -d {data}")
    return 0
