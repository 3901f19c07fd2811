"""A conversation about images: what calibration data of a vision-language model is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages: as chat templates take them, [{"role", "content": [{"type": "image"} | {"type": "text", "text"}]}].

    images: RGB, one for each {"type": "image"} in the order of the messages; none for a text. where: what to call
    this one in an error.
    """

    messages: tuple[dict[str, Any], ...]
    images: tuple[Image, ...]
    where: str
