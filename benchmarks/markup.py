"""HTML and SVG from function calls, in which every string is escaped unless it is markup already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias


class Html(str):
    """Markup: safe to put into a page as it is."""

    __slots__ = ()


Child: TypeAlias = str | Iterable[str] | None
VOID = frozenset({"meta", "br", "hr"})


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """One element.

    Args:
        name: of the element.
        children: text (escaped), markup, or lists of both; None is left out.
        attributes: `class_` is class, other underscores are hyphens; None is left out. Floats get two decimals.
    """
    opening = "".join([name, *(_attribute(key, value) for key, value in attributes.items() if value is not None)])
    if name in VOID:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Children one after another."""
    return Html("".join(_text(child) for child in children))


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return escape(child)
    return "".join(_text(part) for part in child)


def _attribute(key: str, value: object) -> str:
    name = "class" if key == "class_" else key.replace("_", "-")
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{escape(text)}"'
