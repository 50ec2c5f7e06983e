"""Generated tweets with several independent attributes each, and the documents a tiny model is pretrained on.

Everything is a pure function of its seed: the same seed gives the same text on every machine. `python -m
benchmarks.tiny_model.generate` writes the two tables of the package, `tweets.csv` and `tweets_eval.csv`.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.tiny_model import instructions, words
from softprompt.tiny import train_table

TEXT_COLUMN = "Tweet text"
LABEL_COLUMN = "Label"
TRAIN_ROWS, TRAIN_SEED = 200, 1_001
EVAL_ROWS, EVAL_SEED = 200, 2_002

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Tweet:
    """A tweet and the label of each attribute, e.g. `labels["complaint"] == "no complaint"`."""

    text: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Document:
    """One pretraining document: `prompt` is context, `label` is what follows it; plain text has no label.

    A labelled document reads `prompt + label` and the end-of-sequence token; `attribute` names what the label
    answers, and `instructed` says whether the prompt tells so.
    """

    prompt: str
    label: str
    attribute: str
    instructed: bool


def template(text: str) -> str:
    """The classification template of PEFT's prompt-tuning example for a table with a `Tweet text` column."""
    return f"{TEXT_COLUMN} : {text} {LABEL_COLUMN} : "


def _fill(pattern: str, rng: Random, banks: dict[str, tuple[str, ...]]) -> str:
    def pick(match: re.Match[str]) -> str:
        return rng.choice(banks[match[1]])

    while "{" in pattern:
        pattern = _SLOT.sub(pick, pattern)
    return pattern


def _typo(word: str, rng: Random) -> str:
    at = rng.randrange(1, len(word) - 1)
    edits: tuple[Callable[[], str], ...] = (
        lambda: word[:at] + word[at + 1 :],
        lambda: word[:at] + word[at] + word[at:],
        lambda: word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    )
    return rng.choice(edits)()


def _roughen(text: str, rng: Random) -> str:
    """What hurried thumbs do: a typo, a shouted word, no capitals, short forms."""
    if rng.random() < 0.3:
        text = re.sub(r"\byou\b", "u", re.sub(r"\byour\b", "ur", text)).replace("please", "pls")
    if rng.random() < 0.3:
        text = text.replace("can not", "cant").replace("will not", "wont").replace("I am", "im")
    parts = text.split(" ")
    plain = [i for i, part in enumerate(parts) if part.isalpha() and len(part) > 3]
    if plain and rng.random() < 0.12:
        at = rng.choice(plain)
        parts[at] = _typo(parts[at], rng)
    if plain and rng.random() < 0.08:
        at = rng.choice(plain)
        parts[at] = parts[at].upper()
    text = " ".join(parts)
    return text if rng.random() < 0.4 else text[:1].upper() + text[1:]


def _handle(kind: str, rng: Random) -> str:
    if kind == "company":
        return "@" + rng.choice(words.BANKS["company"]) + rng.choice(words.BANKS["desk"])
    first, last = rng.choice(words.BANKS["person"]).lower(), rng.choice(words.BANKS["surname"])
    number = str(rng.randrange(100)) if rng.random() < 0.5 else ""
    return "@" + first + rng.choice(("_", "", ".")) + last + number


def make_tweet(rng: Random) -> Tweet:
    """Draw every attribute by itself, then write a tweet that shows all of them."""
    topic = rng.choice(tuple(words.THINGS))
    complaint, question = rng.random() < 0.5, rng.random() < 0.5
    mood = rng.choice(tuple(words.MOODS))
    time = rng.choice(tuple(words.TIMES))
    mention = rng.choice(words.MENTIONS)
    banks = words.BANKS | {
        "thing": words.THINGS[topic],
        "fault": words.FAULTS[topic],
        "praise": words.PRAISE[topic],
    }

    core = _fill(rng.choice(words.CORES[complaint, question]), rng, banks)
    when = _fill(rng.choice(words.TIMES[time]), rng, banks)
    if when:
        core = f"{when} {core}" if rng.random() < 0.3 else f"{core} {when}"
    if question:
        core += rng.choice((" ?", "?", "??", ""))
    elif rng.random() < 0.6:
        core += rng.choice((".", " !", "!!", "..."))
    feeling = _fill(rng.choice(words.MOODS[mood]), rng, banks)
    sentences = [core, feeling] if rng.random() < 0.6 else [feeling, core]
    if rng.random() < 0.25:
        sentences.insert(0, rng.choice(words.BANKS["opener"]))
    joint = rng.choice((" ", " ", " , ", ". ", " - "))
    text = _roughen(joint.join(sentence for sentence in sentences if sentence), rng)
    if mention != "nobody":
        handle = _handle(mention, rng)
        text = f"{handle} {text}" if rng.random() < 0.7 else f"{text} {handle}"
    if rng.random() < 0.25:
        text += " " + rng.choice(words.BANKS["hashtag"])
    if rng.random() < 0.08:
        text += " https://t.co/" + "".join(rng.choice("abcdefghkmnpqrstuvwxyz23456789") for _ in range(6))
    labels = {
        "complaint": "complaint" if complaint else "no complaint",
        "topic": topic,
        "mood": mood,
        "mention": mention,
        "time": time,
        "form": "question" if question else "statement",
    }
    return Tweet(text, labels)


def make_instruction(attribute: str, rng: Random) -> str:
    """An instruction of 2 to 15 words that names the attribute, in one of some hundred ways."""
    nouns, clauses = instructions.SUBJECTS[attribute]
    use_noun = rng.random() < 0.6
    pattern = rng.choice(instructions.NOUN_PATTERNS if use_noun else instructions.CLAUSE_PATTERNS)
    text = _fill(pattern, rng, instructions.WORDS | {"noun": nouns, "clause": clauses})
    return text[0].upper() + text[1:]


def make_plain_text(rng: Random) -> str:
    """A few sentences that are neither a tweet nor labelled."""
    topic = rng.choice(tuple(words.THINGS))
    banks = words.BANKS | {
        "thing": words.THINGS[topic],
        "topic": (topic,),
        "time": tuple(time for times in words.TIMES.values() for time in times if time),
    }
    return " ".join(_fill(rng.choice(words.PLAIN), rng, banks) for _ in range(rng.randrange(1, 4)))


def make_unrelated_lead(rng: Random) -> str:
    """Words in front of a tweet that ask for nothing, some of them words of instructions."""
    banks = words.BANKS | instructions.WORDS
    names = ("adjective", "place", "animal", "person", "event", "Sort", "Give", "Decide", "look")
    return " ".join(rng.choice(banks[rng.choice(names)]) for _ in range(rng.randrange(2, 11)))


def documents(
    seed: int,
    *,
    excluded: Collection[str] = frozenset(),
    instructed_share: float = 0.65,
    bare_share: float = 0.28,
    unrelated_share: float = 0.4,
) -> Iterator[Document]:
    """Endless pretraining documents: tweets with an instruction, tweets without one, and plain text.

    Without an instruction, or with unrelated words in its place, the label is that of a random attribute: the
    complaint half as often as each other one. Tweets in `excluded` are skipped.
    """
    rng = Random(seed)
    while True:
        draw = rng.random()
        if draw >= instructed_share + bare_share:
            yield Document(make_plain_text(rng), "", "", False)
            continue
        tweet = make_tweet(rng)
        if tweet.text in excluded:
            continue
        lead = ""
        instructed = draw < instructed_share
        if instructed:
            attribute = rng.choice(instructions.ATTRIBUTES)
            lead = make_instruction(attribute, rng) + "\n"
        else:
            attribute = rng.choice(instructions.ATTRIBUTES + instructions.ATTRIBUTES[1:])
            if rng.random() < unrelated_share:
                lead = make_unrelated_lead(rng) + "\n"
        yield Document(lead + template(tweet.text), tweet.labels[attribute], attribute, instructed)


def complaint_table(
    rows: int, seed: int, *, excluded: Collection[str] = frozenset()
) -> list[tuple[str, str]]:
    """`rows` pairs (tweet, label) of distinct tweets, half of them complaints, in random order."""
    rng = Random(seed)
    wanted = {"complaint": rows // 2, "no complaint": rows - rows // 2}
    table: list[tuple[str, str]] = []
    seen = set(excluded)
    while len(table) < rows:
        tweet = make_tweet(rng)
        label = tweet.labels["complaint"]
        if tweet.text not in seen and wanted[label] > 0:
            seen.add(tweet.text)
            wanted[label] -= 1
            table.append((tweet.text, label))
    return table


def train_rows() -> list[tuple[str, str]]:
    """The rows of `tweets.csv`."""
    return complaint_table(TRAIN_ROWS, TRAIN_SEED)


def eval_rows() -> list[tuple[str, str]]:
    """The rows of `tweets_eval.csv`: other tweets than those of `train_rows`."""
    return complaint_table(EVAL_ROWS, EVAL_SEED, excluded={text for text, _ in train_rows()})


def write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write rows as CSV with a header, in UTF-8 with newline line ends."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((TEXT_COLUMN, LABEL_COLUMN))
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=train_table().parent, help="folder of the two tables")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "tweets.csv", train_rows())
    write_table(folder / "tweets_eval.csv", eval_rows())


if __name__ == "__main__":
    main()
