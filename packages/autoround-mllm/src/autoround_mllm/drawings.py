"""The data set `synthetic`: images drawn on the spot, with captions and answers that are true.

A machine without a hub has no photographs with captions. It can draw: shapes, charts, tables, lines of text, simple
scenes. What the words say is known before the pen moves, so every caption is right, and a caption that is right is what
the language tower must be able to read off the image tokens. Each kind of drawing is one function in `KINDS`; the
stream takes them in turn.

Number `index` of a part is made from a hash of both, so parts share no image, an image does not depend on those before
it, and the same Pillow gives the same pixels everywhere. Sentences come from the documentation of the running Python,
so another version of Python gives other sentences.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Literal

from autoround_core.corpus import PARTS
from autoround_core.errors import unknown_name
from autoround_mllm.canvas import Canvas, Drawing, new_canvas
from autoround_mllm.conversation import Conversation
from autoround_mllm.drawn_charts import bar_chart, line_chart, pie_chart, table
from autoround_mllm.drawn_scenes import scene
from autoround_mllm.drawn_shapes import arrangement, counting
from autoround_mllm.drawn_text import clock, page, plate, sign

KINDS: dict[str, Callable[[Canvas], Drawing]] = {
    "counting": counting,
    "bar chart": bar_chart,
    "sign": sign,
    "arrangement": arrangement,
    "table": table,
    "page": page,
    "scene": scene,
    "line chart": line_chart,
    "plate": plate,
    "pie chart": pie_chart,
    "clock": clock,
}
_DESCRIBE = (
    "Describe the image.",
    "What does this image show?",
    "Write a caption for this picture.",
    "Please describe what you see.",
    "Tell me what is in the image.",
)
_TURNS = (1, 2, 2, 3)


def drawings(part: Literal["calibration", "evaluation"] = "calibration") -> Iterator[Conversation]:
    """Yield conversations of one to three questions about one drawn RGB image, without end.

    Raises UnknownNameError for another part.
    """
    if part not in PARTS:
        raise unknown_name("part of the data set `synthetic`", part, PARTS)
    return (conversation(part, index) for index in itertools.count())


def conversation(part: str, index: int) -> Conversation:
    """Number `index` of a part."""
    rng = seeded(f"synthetic {part} {index}")
    kind = tuple(KINDS)[index % len(KINDS)]
    drawing = KINDS[kind](new_canvas(rng, part))
    asked = [(rng.choice(_DESCRIBE), drawing.caption), *drawing.questions]
    first = rng.random() < 0.5  # a description, or a question at once
    rest = rng.sample(asked[1:], min(len(asked) - 1, rng.choice(_TURNS) - first))
    turns = [asked[0], *rest] if first else rest
    messages = list(itertools.chain.from_iterable(_turn(*turn) for turn in turns))
    messages[0]["content"].insert(0, {"type": "image"})
    return Conversation(tuple(messages), (drawing.image,), f"synthetic:{part}[{index}] ({kind})")


def seeded(name: str) -> Random:
    """Random numbers that depend on a name alone."""
    return Random(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big"))


def _turn(question: str, answer: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {"role": "user", "content": [{"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )
