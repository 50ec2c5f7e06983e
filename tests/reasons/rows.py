"""What a reason is, and what several of them need."""

import re
from dataclasses import dataclass

from parity import make_batch
from tiny_models import build, prompted

import softprompt

BATCH = make_batch(side="left", labels="everywhere")
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}


def pattern_of(sentence):
    """A pattern for a sentence of the sources, which has {} where values stand."""
    return ".*".join(re.escape(part) for part in sentence.split("{}"))


@dataclass(frozen=True)
class Row:
    """A reason, and how it comes about."""

    sentence: str
    make: object
    said: str = "warning"  # "warning", "error", or "explain": the fast route is taken without it
    name: str = ""
    reads: str = ""  # what is looked for, where the sentence is a part of it or hardly more than its values

    @property
    def pattern(self):
        return pattern_of(self.reads or self.sentence)

    @property
    def id(self):
        return self.name or " ".join((self.reads or self.sentence).replace("{}", "").split()[:7])


def patched(change, name="llama", settings=None, **options):
    """Changes the language model, then patches."""

    def act(kit):
        model = prompted(name, **(settings or {}))
        change(model.get_base_model())
        return softprompt.patch(model, **options)

    return act


def explained(change, name="llama"):
    """A language model that PEFT could not wrap, or that needs no adapter to show it."""

    def act(kit):
        base = build(name)
        return change(base) or base

    return act


def as_it_is(base):
    """Leaves a model as it is."""
