"""The options of `softprompt predict`."""

from dataclasses import dataclass

from softprompt.cli.options import ComputeOptions, TableOptions, flag, given, nested, option, whole
from softprompt.tasks.text_files import A_TABLE


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """The options of `softprompt predict`."""

    adapter: str = option(
        "folder that `softprompt train` wrote", given, "FOLDER", required=True, group="data"
    )
    data: str = option(
        f"rows to label, or to write texts for: {A_TABLE}",
        given,
        "TABLE",
        required=True,
    )
    text_column: str | None = option(
        "column with the texts (default: the name that it had in training)", given, "NAME"
    )
    output: str = option(
        "file to write, of a type that --data may have, by its extension", given, "FILE", required=True
    )
    output_column: str = option(
        "name of the column with the labels, or the texts", given, "NAME", default="prediction"
    )
    overwrite: bool = flag("replace the output file if there is one")
    model: str | None = option(
        "the frozen model, if it is not where it was in training (default: the one trained with)",
        given,
        "NAME",
    )
    table: TableOptions = nested(TableOptions)
    score: bool = flag(
        "write the probability of each label beside the likeliest one; an ensemble always does",
        group="scoring",
    )
    calibrate: bool = flag("take out what the model prefers even for texts that say nothing")
    length_normalise: bool = flag("compare labels by the mean over their tokens, not by the sum")
    generate: bool = flag(
        "let the model write what it wants, token by token, instead of choosing the likeliest of the labels "
        "of the training"
    )
    max_new_tokens: int | None = option(
        "longest text that a prompt of --task generate writes, in tokens (default: that of the training)",
        whole(1),
        "N",
    )
    label_column: str | None = option(
        "column with the true labels, to measure accuracy and macro-F1 and to draw which label "
        "was taken for which, or with the targets, to measure exact match, ROUGE-L and BLEU (default: the "
        "one of the training, if the table has it)",
        given,
        "NAME",
    )
    combine: str | None = option(
        "how the prompts of an ensemble decide: by majority, or by mean log-probability (default: vote)",
        choices=("vote", "mean"),
    )
    compute: ComputeOptions = nested(ComputeOptions)
