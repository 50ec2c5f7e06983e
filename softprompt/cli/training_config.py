"""The options of a training run: what each is, its default, and what it may be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from softprompt.cli.checks import UsageError, usage_errors
from softprompt.cli.options import (
    MAX_SEED,
    ComputeOptions,
    TableOptions,
    flag,
    given,
    label_and_words,
    nested,
    number,
    option,
    option_name,
    read_options,
    template_text,
    values_of,
    whole,
    words,
)
from softprompt.prompt_paths import check_prompt_path
from softprompt.tasks.classification import CHOICES, DEFAULT_TEMPLATE
from softprompt.tasks.folders import adapter_folders
from softprompt.tasks.labels import FEWEST_TARGETS
from softprompt.tasks.text_files import A_TABLE

GENERATION_TEMPLATE = "{{text_column}}: {{text}}\n{label_column}:"
INITS = (
    "answers",
    "label-words",
    "text",
    "text-once",
    "labels",
    "common",
    "counted",
    "vocab",
    "matched",
    "uniform",
    "random",
    "saved",
)
FEWEST_STEPS, DEFAULT_STEPS = 40, 100
MOST_PASSES = 16  # by default: small tables are learned by heart in more
RELATIVE_RATE = 0.25  # of the model's embedding scale, see softprompt.prompts.vocabulary.scale_of
ROWS_FOR_VALIDATION, VALIDATION_ROWS = 500, 128
LONGEST = 256
RECIPES: dict[str | None, dict[str, Any]] = {
    "article": {
        "template": "{text_column} : {text} Label : ",
        "label_prefix": "",
        "end_token": "pad",
        "max_length": 64,
        "init": "text",
        "init_text": "Classify if the tweet is a complaint or not:",
        "num_virtual_tokens": 8,
        "learning_rate": 3e-2,
        "adam_beta2": 0.999,
        "batch_size": 8,
        "epochs": 50,
        "validation_share": 0.0,
    },
    "paper": {
        "optimizer": "adafactor",
        "learning_rate": 0.3,
        "schedule": "constant",
        "num_virtual_tokens": 100,
        "weight_decay": 1e-5,
    },
}
# The shipped tiny model was made for the article's words, and ends its sentences with eos.
SHIPPED = {**RECIPES["article"], "end_token": "eos", "epochs": 10}
# Options whose defaults are made for labels, those of the shipped model among them.
FOR_LABELS = ("template", "label_prefix", "max_length", "init", "init_text")
# With the task and the training rows, all that decides the trained prompt: a resumed run must have the same.
SETTINGS = (
    "num_virtual_tokens",
    "init",
    "init_text",
    "init_from",
    "epochs",
    "steps",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "adam_beta2",
    "optimizer",
    "schedule",
    "seed",
    "ensemble",
    "ensemble_texts",
    "validation_share",
    "patience",
    "dtype",
)
NOT_SWEPT = ("ensemble", "ensemble_texts", "validation_share", "patience")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The options of `softprompt train`; a sweep is over some of them."""

    argv: list[str] = field(default_factory=list)  # what was typed
    data: str | None = option(
        f"training table: {A_TABLE} (default: the shipped table)",
        given,
        "TABLE",
        group="data",
    )
    text_column: str = option("column with the texts", given, "NAME", default="Tweet text")
    label_column: str = option(
        "column with the labels, or the target texts, to learn", given, "NAME", default="Label"
    )
    label_map: list[tuple[str, str]] | None = option(
        "words to learn in the place of labels of the table, as 0=negative 1=positive; a label ends at the "
        "first =, and one that begins with - is given as --label-map=-1=negative, beside other --label-map. "
        "The rows to measure on may have the labels or the words; what `softprompt predict` writes has the "
        "labels",
        label_and_words,
        "LABEL=WORDS",
        nargs="+",
        action="extend",
    )
    balance_labels: bool = flag(
        "draw rows of rarer labels more often, so that all labels are learned from as many rows as the most "
        "frequent one"
    )
    task: str | None = option(
        "classify: every row has one of a few labels; generate: every row has a target of its own, as a "
        f"summary, an answer or a translation (default: classify; generate where at least {FEWEST_TARGETS} "
        "rows have as many different targets)",
        choices=("classify", "generate"),
    )
    eval_data: str | None = option(
        "table to measure the accuracy on; without it, a share of the training table is kept for that",
        given,
        "TABLE",
    )
    eval_share: float = option(
        "share of every label's rows to measure on if --eval-data is not given; 0 measures nothing",
        number(0, 1),
        "SHARE",
        default=0.2,
    )
    table: TableOptions = nested(TableOptions)

    model: str | None = option(
        "the frozen causal language model: a folder, a .gguf file or a model name (default: the shipped tiny "
        "model)",
        given,
        "NAME",
        group="model and prompt",
    )
    num_virtual_tokens: int = option("length of the soft prompt", whole(1), "P", default=50)
    init: str | None = option(
        "where the soft prompt starts: at the answers, the end of the template with each label and its end "
        "token, repeated to its length (answers); at the words of the labels, likewise (label-words); at "
        "those of --init-text, repeated to its length (text) or once (text-once); at one token for each "
        "label, the mean of its words (labels); at random ones of the 5,000 tokens with the smallest numbers "
        "(common), of the 5,000 most frequent tokens of the training texts (counted), or of all tokens "
        "(vocab); at random numbers that resemble the model's tokens (matched), lie between -0.5 and 0.5 "
        "(uniform), or are normal with variance 1 (random); or at --init-from (saved). Behind the words of "
        "text-once and labels stand tokens of common (default: answers, counted for --task "
        "generate; text where --init-text is given)",
        choices=INITS,
    )
    init_text: str | None = option("the words for --init text and text-once", words, "TEXT")
    init_from: str | None = option(
        "the prompt for --init saved: the folder of an adapter of the same model (of an ensemble with as "
        "many prompts for --ensemble), or a .npy file [P, H]",
        given,
        "PATH",
    )
    init_other_base: bool = flag(
        "let --init-from name an adapter of another model, such as a variant of this one"
    )
    template: str = option(
        "how a row is put before the model; the label is written behind it. {text} is the text, "
        "{text_column} the name of its column, and any other name in braces the cell of that column; {{ and "
        "}} are braces, \\n is a new line, \\t a tab, \\\\ a backslash",
        template_text,
        default=DEFAULT_TEMPLATE,
    )
    chat_template: bool = flag(
        "put a row before the model in its own chat format: --template is the message of the user, and the "
        "label the answer; for instruction-tuned models"
    )
    label_prefix: str | None = option(
        "what stands between the template and the label, and is learned with it (default: a space, which "
        "the end of a template loses; nothing behind a template that ends with a new line or a tab); with an "
        "empty one the label is tokenized by itself",
        template_text,
        "TEXT",
    )
    max_length: int | None = option(
        "longest row in tokens, label included; a longer text loses its end (default: that of the longest "
        f"row, at most {LONGEST}; of --task generate {LONGEST} and the longest target)",
        whole(1),
        "N",
    )
    max_new_tokens: int | None = option(
        "longest target of --task generate in tokens, the end token included; a longer one loses its end "
        f"(default: that of the longest training target, at most {LONGEST})",
        whole(1),
        "N",
    )
    padding: str = option(
        "fill every row up to --max-length, or only up to the longest row of its batch",
        choices=CHOICES["padding"],
        default="max_length",
    )
    end_token: str | None = option(
        "the token to learn after a label: the tokenizer's end-of-sequence token or its pad token (default: "
        "eos)",
        choices=CHOICES["end_token"],
    )
    positions: str | None = option(
        "whether pads count for the positions of a row: compact trains what a row is alone, and predictions "
        "are made on rows without padding; padded is what PEFT does (default: compact; padded with "
        "--no-patch, and for models that softprompt cannot run otherwise)",
        choices=("compact", "padded"),
    )
    ensemble: int | None = option(
        "train N prompts together, on the same rows in the same order, and predict by their majority; their "
        "seeds are --seed and the numbers after it",
        whole(1),
        "N",
    )
    ensemble_texts: list[str] | None = option(
        "words for each prompt of an ensemble to start from (default with --init text: --init-text for the "
        "first one, and random words of the vocabulary for the others)",
        words,
        "TEXT",
        nargs="+",
    )

    recipe: str | None = option(
        "settings that belong together; options given beside it count more. paper: Adafactor, constant "
        "learning rate 0.3, 100 virtual tokens, weight decay 1e-5 (Lester et al. 2021). article: those of "
        "PEFT's guide to prompt tuning: its template, pad behind the label, 8 virtual tokens from its "
        "words, learning rate 0.03, 50 epochs",
        choices=tuple(RECIPES),
        group="training",
    )
    epochs: int | None = option("passes over the table, each with an evaluation", whole(1), "N")
    steps: int | None = option(
        "training steps, in the place of --epochs: the last pass may end early; evaluated four times "
        f"(default without --epochs: {DEFAULT_STEPS}, of small tables those of {MOST_PASSES} passes, but "
        f"{FEWEST_STEPS} at least)",
        whole(1),
        "N",
    )
    learning_rate: float | None = option(
        f"first learning rate (default: {RELATIVE_RATE:g} of the root mean square of the model's token "
        "embeddings, so that prompts of all models move alike)",
        number(0, open_start=True),
        "RATE",
    )
    schedule: str = option(
        "whether the learning rate falls linearly to 0 or stays as it is",
        choices=("linear", "constant"),
        default="linear",
    )
    optimizer: str = option("optimizer of the prompt", choices=("adamw", "adafactor"), default="adamw")
    adam_beta2: float = option(
        "AdamW's decay of the mean of squared gradients. A run is short: with 0.999 the large gradients of "
        "its first steps keep the later ones small",
        number(0, 1),
        "RATE",
        default=0.95,
    )
    weight_decay: float = option("weight decay of the optimizer", number(0), "RATE", default=0.01)
    seed: int = option("seed of the split, the prompt and the row order", whole(0, MAX_SEED), "N", default=42)
    validation_share: float | None = option(
        "share of every label's training rows to keep for deciding when to stop: training ends once their "
        "loss has stopped falling, and the prompt with the lowest loss is saved; 0 trains to the end "
        f"(default: enough for {VALIDATION_ROWS} rows, 0 with fewer than {ROWS_FOR_VALIDATION} rows to train "
        "on)",
        number(0, 1),
        "SHARE",
    )
    patience: int | None = option(
        "evaluations without a lower loss on the validation rows before training stops (default: 3)",
        whole(1),
        "N",
    )
    compute: ComputeOptions = nested(ComputeOptions)

    output: str = option(
        "folder for the adapter and its checkpoints",
        given,
        "FOLDER",
        default="softprompt-output",
        group="output",
    )
    overwrite: bool = flag("replace an adapter that is in the folder already", one_of="existing")
    resume: bool = flag("go on from the last checkpoint in the folder", one_of="existing")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the trained prompt, with the task and the rows; the run folder keeps it."""
        values = values_of(self)
        return {name: values[name] for name in SETTINGS}

    @property
    def start(self) -> str:
        """`--init`, or what counts without it."""
        without_text = "counted" if self.task == "generate" else "answers"
        return self.init or (without_text if self.init_text is None and not self.ensemble_texts else "text")

    def resolved(self, *, rows: int, scale: float, dtype: str) -> "TrainingConfig":
        """Return the configuration with values for what was left open.

        Args:
            rows: of the training table, before rows for validation are taken.
            scale: of the model's embeddings.
            dtype: that of the frozen model.
        """
        rate, share, steps = self.learning_rate, self.validation_share, self.steps
        if rate is None:
            rate = float(f"{RELATIVE_RATE * scale:.2g}")
        if share is None:
            share = min(0.2, round(VALIDATION_ROWS / rows, 4)) if rows >= ROWS_FOR_VALIDATION else 0.0
        if steps is None and self.epochs is None:
            passes = math.ceil(MOST_PASSES * rows / self.compute.batch_size)
            steps = min(max(FEWEST_STEPS, passes), DEFAULT_STEPS)
        compute = replace(self.compute, dtype=dtype)
        return replace(
            self,
            init=self.start,
            learning_rate=rate,
            validation_share=share,
            steps=steps,
            compute=compute,
        )

    def with_recipe(self) -> "TrainingConfig":
        """Return the configuration with the settings of `--recipe` and of the shipped model.

        Options that were given count more.
        """
        typed = options_in(self.argv)
        recipe = {**(SHIPPED if self.model is None else {}), **RECIPES.get(self.recipe, {})}
        chosen = {name: value for name, value in recipe.items() if option_name(name) not in typed}
        return read_options(TrainingConfig, values_of(self) | chosen)

    def for_task(self, task: str) -> "TrainingConfig":
        """Return the configuration for a task, "classify" or "generate".

        Raises:
            UsageError: options were given that belong to the other one.
        """
        if task == "classify":
            if self.max_new_tokens is not None:
                raise UsageError("--max-new-tokens is for --task generate: labels are never cut")
            return replace(self, task=task)
        if self.label_map or self.balance_labels:
            name = "--label-map" if self.label_map else "--balance-labels"
            raise UsageError(f"{name} is for --task classify: every target of --task generate is another")
        defaults: dict[str, Any] = {each.name: each.default for each in fields(self)}
        label_column = self.label_column.replace("{", "{{").replace("}", "}}")
        defaults["template"] = GENERATION_TEMPLATE.format(label_column=label_column)
        chosen = {*options_in(self.argv), *map(option_name, RECIPES.get(self.recipe, {}))}
        changed = {name: defaults[name] for name in FOR_LABELS if option_name(name) not in chosen}
        config = replace(self, task=task, **changed)
        if config.start in ("answers", "label-words", "labels"):
            raise UsageError(
                f"--init {config.start} starts at the labels, and --task generate has none: give another "
                "--init, or none for --init counted"
            )
        return config

    def with_values(self, values: Mapping[str, Any]) -> "TrainingConfig":
        """Return the configuration of a run of a sweep: with other values of some options."""
        changed = {**values_of(self), **values}
        if "init" in values and changed["init"] != "saved":
            changed |= {"init_from": None, "init_other_base": False}
        return read_options(TrainingConfig, changed)

    def check(self) -> None:
        """Raise UsageError where options contradict each other, or there is no prompt to start from."""
        self._check_ensemble()
        if (
            self.start in ("text", "text-once")
            and not self.ensemble_texts
            and not (self.init_text or "").strip()
        ):
            raise UsageError(
                f"--init {self.start} needs words to start from: give --init-text, or --init answers"
            )
        if self.init == "saved" and not self.init_from:
            raise UsageError("--init saved needs a prompt to start from: give --init-from")
        if self.init != "saved" and (self.init_from or self.init_other_base):
            name = "--init-from" if self.init_from else "--init-other-base"
            raise UsageError(f"{name} belongs to --init saved, but --init is {self.start}")
        if self.init_from and not self.resume:  # a checkpoint holds the prompt
            with usage_errors("--init saved: "):
                for path in adapter_folders(Path(self.init_from)) or [Path(self.init_from)]:
                    check_prompt_path(path)

    def _check_ensemble(self) -> None:
        texts = self.ensemble_texts
        if self.ensemble == 1:
            raise UsageError(
                "--ensemble 1: an ensemble needs at least two prompts; train one without --ensemble"
            )
        if self.ensemble and self.compute.no_patch:
            raise UsageError("--ensemble needs softprompt's path: leave --no-patch out")
        if not texts:
            return
        if not self.ensemble:
            raise UsageError(
                "--ensemble-texts are the words of an ensemble: give --ensemble, or --init-text instead"
            )
        if len(texts) != self.ensemble:
            raise UsageError(
                f"--ensemble-texts: expected one text for each of the {self.ensemble} prompts of --ensemble, "
                f"got {len(texts)}"
            )
        if self.start != "text":
            raise UsageError(f"--ensemble-texts needs --init text, got --init {self.init}")
        if len(set(texts)) < len(texts) or not all(map(str.strip, texts)):
            raise UsageError(
                "--ensemble-texts: texts that are empty or the same give prompts that are the same"
            )


def options_in(argv: list[str]) -> set[str]:
    """Return the options that a command line gives, without their values."""
    return {argument.split("=")[0] for argument in argv}
