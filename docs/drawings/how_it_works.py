"""Draws docs/how-it-works.svg, the way of one training call: `python docs/drawings/how_it_works.py`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from html import escape
from pathlib import Path

TARGET = Path(__file__).parents[1] / "how-it-works.svg"
WIDTH, BOX, LINE, GAP = 1060, 310, 17, 28
COLUMNS = (15, 375, 735)  # left edges: what PEFT does, the way of a call, what stands beside it


@dataclass(frozen=True)
class Step:
    """A box: a title, the file that it stands in, and what happens there."""

    key: str
    title: str
    file: str
    lines: tuple[str, ...]
    column: int = 1
    colour: str = "#eef4ff"


# The way of a call, from top to bottom.
WAY = (
    Step("forward", "PatchedModel._forward", "patched_model.py", ("PEFT's signature, one thread at a time",)),
    Step(
        "eligibility",
        "reason_for_peft",
        "eligibility.py",
        ("does the fast route serve this call?", "a sentence if not"),
    ),
    Step(
        "batch",
        "batch_of",
        "prompt_encoders.py",
        ("prompts [P, H], from PEFT's encoders;", "texts, mask and labels [B, L], checked"),
    ),
    Step("runner", "ModelRunner.run", "engine/runner.py", ("a recorded step, or this one:",)),
    Step(
        "layout",
        "packed_layout",
        "engine/packed.py",
        (
            "ops/pack_layout: int32 indices of",
            "[prompts | texts], T tokens, M labels;",
            "the one read by the host",
        ),
    ),
    Step(
        "decode",
        "decode_packed",
        "engine/packed.py",
        (
            "ops/embed_prompt: embeddings [1, T, H]",
            "the model's own decoder, whose attention",
            "is that of the packed row",
        ),
    ),
    Step(
        "losses",
        "label_losses @ weights",
        "engine/losses.py",
        ("ops/linear_cross_entropy: the loss [M]", "of each label, then their weighted sum"),
    ),
    Step(
        "output",
        "loss, lazy logits",
        "engine/lazy_logits.py",
        ("logits [B, P + L, V] are computed", "when something looks at them"),
    ),
)
# Beside the way: the box, and the step that it belongs to.
BESIDE = (
    (
        Step(
            "peft",
            "PEFT's own forward",
            "patched_model.py",
            ("with one warning that names", "the reason"),
            0,
            "#fff3e6",
        ),
        "eligibility",
    ),
    (
        Step(
            "plan",
            "plan_for",
            "engine/plan.py",
            (
                "candidates, tried on two short rows",
                "against the model's padded forward;",
                "again when the model has changed",
            ),
            2,
            "#eefaf0",
        ),
        "runner",
    ),
    (
        Step(
            "graph",
            "StepGraphs.step",
            "engine/step_graph.py",
            ("on a GPU: decode, losses and gradient", "captured once, replayed afterwards"),
            0,
            "#eefaf0",
        ),
        "layout",
    ),
    (
        Step(
            "attention",
            "packed_attention",
            "engine/attention_overrides.py",
            (
                "put in for one call, by AttentionInterface",
                "or module by module;",
                "ops/shared_prompt_attention",
            ),
            2,
            "#eefaf0",
        ),
        "decode",
    ),
)


def height(step: Step) -> int:
    """Of a box, in pixels."""
    return 22 + LINE * (1 + len(step.lines)) + 8


def _box(step: Step, top: int) -> list[str]:
    left = COLUMNS[step.column]
    rows = [
        f'<rect x="{left}" y="{top}" width="{BOX}" height="{height(step)}" rx="6" fill="{step.colour}" '
        'stroke="#5a6b85"/>',
        f'<text x="{left + 12}" y="{top + 20}" class="title">{escape(step.title)}</text>',
        f'<text x="{left + 12}" y="{top + 20 + LINE}" class="file">softprompt/{escape(step.file)}</text>',
    ]
    for number, line in enumerate(step.lines, start=2):
        rows.append(f'<text x="{left + 12}" y="{top + 20 + LINE * number}">{escape(line)}</text>')
    return rows


def _arrow(x1: int, y1: int, x2: int, y2: int, *, both: bool = False) -> str:
    start = ' marker-start="url(#head)"' if both else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="arrow"{start}/>'


def draw() -> str:
    """The drawing as SVG."""
    tops, top = {}, 20
    body: list[str] = []
    for step in WAY:
        tops[step.key] = top
        body += _box(step, top)
        top += height(step) + GAP
    middle = COLUMNS[1] + BOX // 2
    for step, after in itertools.pairwise(WAY):
        body.append(_arrow(middle, tops[step.key] + height(step), middle, tops[after.key]))
    by_key = {step.key: step for step in WAY}
    for step, belongs in BESIDE:
        beside = tops[belongs]
        body += _box(step, beside)
        y = beside + min(height(step), height(by_key[belongs])) // 2
        if step.column == 0:
            body.append(_arrow(COLUMNS[1], y, COLUMNS[0] + BOX, y))
        else:
            body.append(_arrow(COLUMNS[1] + BOX, y, COLUMNS[2], y, both=True))
    style = (
        "text{font:13px sans-serif;fill:#1d2733}.title{font-weight:bold;font-size:14px}"
        ".file{font-family:monospace;font-size:12px;fill:#3b5b8c}"
        ".arrow{stroke:#5a6b85;stroke-width:1.5;marker-end:url(#head)}"
    )
    marker = (
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="#5a6b85"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - GAP + 20}" role="img">',
            "<title>The way of one training call through softprompt</title>",
            f"<style>{style}</style><defs>{marker}</defs>",
            f'<rect width="{WIDTH}" height="{top - GAP + 20}" fill="white"/>',
            *body,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
