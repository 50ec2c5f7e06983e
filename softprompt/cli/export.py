"""`softprompt export`: a trained prompt for other programs."""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.errors import UsageError
from softprompt.cli.options import Parser, add_command, add_prompt_options, given, whole, words
from softprompt.cli.paths import check_inputs, check_prompt_option
from softprompt.files import write_text
from softprompt.tasks.folders import holds_adapter

if TYPE_CHECKING:
    from softprompt.cli.adapters import SavedPrompt

DEFAULT_MAX_TOKENS = 16


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `softprompt export`."""
    parser = add_command(
        commands,
        "export",
        summary="write a trained soft prompt for other programs",
        description="Write a soft prompt as a .npy array, as an adapter folder of PEFT, or, together with a "
        "text, as a request that a vLLM server answers.",
        example="softprompt export --adapter softprompt-output --format vllm \\\n"
        '      --text "my order never came" --output request.json',
        run=run,
    )
    add_prompt_options(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=("npy", "vllm", "peft"),
        help="npy: an array [P, H] of float32; peft: a folder with PEFT's two adapter files; "
        "vllm: a request with the vectors of prompt and text in the place of the text",
    )
    parser.add_argument(
        "--output",
        type=given,
        required=True,
        metavar="PATH",
        help="what to write: a .npy file, a folder for peft, and for vllm a .json file with the body of a "
        "request to /v1/completions or a .pt file with the tensor alone",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --output names if it is there")
    vllm = parser.add_argument_group("--format vllm")
    vllm.add_argument(
        "--text",
        type=words,
        help="the text to answer; an adapter of `softprompt train` puts it into the template of its training",
    )
    vllm.add_argument(
        "--served-model",
        type=given,
        metavar="NAME",
        help="the name of the model on the server (default: the name of --model)",
    )
    vllm.add_argument(
        "--max-tokens",
        type=whole(1),
        metavar="N",
        help=f"longest answer in tokens (default: that of the longest label, or {DEFAULT_MAX_TOKENS})",
    )


def run(args: argparse.Namespace) -> int:
    """Check what was asked, read the prompt, write the file or the folder."""
    output = Path(args.output)
    _check(args, output)
    check_prompt_option("--adapter", args.adapter)
    check_inputs(model=args.model)

    from softprompt import export
    from softprompt.cli.adapters import load_base, open_prompt
    from softprompt.cli.models import quiet_libraries
    from softprompt.prompts.export import write_adapter

    quiet_libraries()
    saved = open_prompt(args.adapter, args.model)
    if saved.config is not None and saved.config.modules_to_save:
        raise UsageError(
            f"{saved.source} holds trained modules of the model beside the prompt "
            f"({', '.join(saved.config.modules_to_save)}): without them the prompt gives other answers"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "npy":
        export.save_npy(saved.prompt, output)
    elif args.format == "vllm":
        return _write_request(args, saved, output)
    elif saved.config is not None and args.model is None:
        write_adapter(saved.config, saved.prompt, output)
    else:
        base, _ = load_base(saved)
        export.save_peft(base, saved.prompt, output)
    print(f"{len(saved.prompt)} virtual tokens of {saved.prompt.shape[1]} numbers: {output}")
    return 0


def _check(args: argparse.Namespace, output: Path) -> None:
    endings = {"npy": (".npy",), "vllm": (".json", ".pt"), "peft": ()}[args.format]
    if endings and output.suffix not in endings:
        raise UsageError(f"--format {args.format} writes {' or '.join(endings)}: rename --output {output}")
    if args.format == "peft":
        if output.exists() and not output.is_dir():
            raise UsageError(f"--output {output} is a file: name a folder")
        taken = holds_adapter(output)
    else:
        taken = output.exists()
        if output.is_dir():
            raise UsageError(f"--output {output} is a folder: name a file")
    if taken and not args.overwrite:
        raise UsageError(f"{output} exists already: name another --output or replace it with --overwrite")
    if args.format == "vllm":
        if args.text is None:
            raise UsageError("--format vllm needs the text that stands behind the prompt: give --text")
        return
    for option in ("text", "served_model", "max_tokens"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} belongs to --format vllm, not {args.format}")


def _write_request(args: argparse.Namespace, saved: "SavedPrompt", output: Path) -> int:
    from softprompt import export
    from softprompt.cli.adapters import load_base
    from softprompt.cli.models import load_tokenizer
    from softprompt.tasks.classification import Encoder

    base, name = load_base(saved)
    tokenizer = load_tokenizer(name)
    stops: list[int] = []
    longest = DEFAULT_MAX_TOKENS
    if saved.task is None:
        ids = tokenizer(args.text)["input_ids"]
    else:
        if saved.task.columns:
            raise UsageError(
                f"the template of {saved.source} reads {', '.join(map(repr, saved.task.columns))} beside the "
                "text, and --text is one text: export --format npy, and fill the template in where rows are"
            )
        encoder = Encoder(saved.task, tokenizer)
        ids, stops, longest = encoder.prompt(args.text), encoder.stop_token_ids, encoder.max_target
    try:
        embeds = export.prompt_embeds(base, ids, saved.prompt)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if output.suffix == ".pt":
        export.save_tensor(embeds, output)
    else:
        body = export.completion_request(
            args.served_model or name,
            embeds,
            max_tokens=args.max_tokens or longest,
            stop_token_ids=stops,
        )
        _write_json(body, output)
    tokens = f"{len(saved.prompt)} virtual and {len(ids)} text tokens"
    print(f"{tokens}, {list(embeds.shape)} of {str(embeds.dtype).removeprefix('torch.')}: {output}")
    if output.suffix == ".json":
        data = shlex.quote(f"@{output}")
        print(f"send it: curl URL/v1/completions -H 'Content-Type: application/json' -d {data}")
    return 0


def _write_json(body: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(body) + "\n")
