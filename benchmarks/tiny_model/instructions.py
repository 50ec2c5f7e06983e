"""The instructions of the pretraining documents: one small grammar per attribute.

No instruction holds the word "complaint": the model meets it as a label only, so that a prompt
initialised with a sentence about complaints does not solve the task before it is tuned.
"""

from __future__ import annotations

ATTRIBUTES: tuple[str, ...] = ("complaint", "topic", "mood", "mention", "time", "form")

# attribute -> (noun phrases of what is looked for, yes-or-no clauses about the tweet)
SUBJECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "complaint": (
        (
            "customer trouble",
            "trouble with a service",
            "an unhappy buyer",
            "bad service",
            "a service going wrong",
        ),
        (
            "a customer is unhappy",
            "a buyer wants help",
            "something went wrong for a client",
            "a firm must act",
        ),
    ),
    "topic": (
        ("subject", "area of life", "theme", "branch of trade", "field", "kind of product"),
        ("it belongs to which subject", "it deals with which theme", "it falls into which area"),
    ),
    "mood": (
        ("mood", "feeling of the writer", "emotion", "state of mind", "temper"),
        ("the writer feels good or bad", "the writer shows an emotion", "there is a strong feeling"),
    ),
    "mention": (
        ("account spoken to", "handle", "addressee", "receiver", "name after the at sign"),
        ("it is sent to an account", "somebody is addressed", "a handle is named"),
    ),
    "time": (
        ("date", "hour", "part of the day", "moment", "clock or calendar word"),
        ("a date is given", "it says when", "it tells the hour or day"),
    ),
    "form": (
        ("kind of sentence", "grammar", "sentence type", "way of asking or telling", "way of speaking"),
        ("the writer asks something", "it wants an answer", "something is asked or told"),
    ),
}

NOUN_PATTERNS: tuple[str, ...] = (
    "{Sort} the tweet by {noun}:",
    "{Sort} this by {noun}.",
    "{Give} the {noun} of the tweet:",
    "Is it about {noun}?",
    "{noun}, please:",
    "{noun}:",
    "{noun}?",
    "Read the tweet and {look} for {noun}:",
    "Task: {noun}.",
)
CLAUSE_PATTERNS: tuple[str, ...] = (
    "{Decide} if {clause}:",
    "{Decide} whether {clause} or not:",
    "In this tweet, {clause}?",
    "{Decide} if in the tweet {clause}.",
)
WORDS: dict[str, tuple[str, ...]] = {
    "Sort": ("Classify", "Sort", "Label", "Tag", "Order"),
    "Give": ("Give", "Name", "Find", "State", "Write"),
    "Decide": ("Classify", "Decide", "Tell", "Say", "Check", "Judge"),
    "look": ("look", "search", "check"),
}
