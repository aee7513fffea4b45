"""Draws a transition table as a Mermaid state diagram, so that the documentation shows what the code does."""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


def mermaid(transitions: Mapping[tuple[S, E], S], start: S) -> str:
    """Return a fenced `mermaid` block with one arrow for each row of the table, in its order."""
    arrows = [f"    {before.name} --> {after.name}: {event.value}" for (before, event), after in transitions.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {start.name}", *arrows, "```"])
