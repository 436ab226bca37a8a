"""What the pages of all reports share: a file that needs nothing else, tables, lists of facts, and the record itself.

No network, no scripts, no fonts; the page's own content security policy forbids them. All text is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import words
from benchmarks.machine import Machine
from benchmarks.markup import Child, Html, join, tag
from benchmarks.style import CSS

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, sections: Sequence[Html | None], footer: str) -> str:
    """A whole page.

    Args:
        title: of the window.
        sections: the header first; None is left out.
        footer: one line at the end.
    """
    markup = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("title", title),
            tag("style", Html(CSS)),
        ),
        tag("body", tag("main", *sections), tag("footer", footer)),
        lang="en",
    )
    return f"<!doctype html>\n{markup}\n"


def table(
    caption: str, headers: Sequence[str], rows: Sequence[Sequence[Child]], chosen: Sequence[bool] | None = None
) -> Html:
    """A table whose first column names the rows. It scrolls by itself where the page is narrow."""
    marks = chosen or [False] * len(rows)
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            [tag("td", cell, class_="number") for cell in row[1:]],
            class_="chosen" if mark else None,
        )
        for row, mark in zip(rows, marks, strict=True)
    ]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", [tag("th", header, scope="col") for header in headers])),
            tag("tbody", body),
        ),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex="0",
    )


def facts(named: Mapping[str, str]) -> Html:
    """A list of names and what is to be said of them."""
    return tag("dl", [join(tag("dt", name), tag("dd", fact)) for name, fact in named.items()], class_="facts")


def texts(found: Mapping[str, Mapping[str, Any]]) -> list[Html]:
    """What each text was: source, hash and size."""
    return [
        join(
            tag("h3", f"{name[:1].upper()}{name[1:]} text"),
            facts({key: plain(value) for key, value in text.items()}),
        )
        for name, text in found.items()
    ]


def machine_facts(machine: Machine) -> Html:
    """Where it was measured."""
    cores = f"{machine.usable_cores} of {machine.logical_cores} hardware threads used"
    flags = f"; {', '.join(machine.cpu_flags)}" if machine.cpu_flags else ""
    return join(
        tag("h3", "Machine"),
        facts(
            {
                "CPU": f"{machine.cpu} ({machine.architecture}{flags})",
                "Cores": f"{machine.physical_cores or 'unknown'} physical; {cores}",
                "Memory": words.size(machine.memory_bytes),
                "System": f"{machine.system}, Python {machine.python}",
                "Packages": ", ".join(f"{name} {version}" for name, version in machine.packages.items()),
                "Commit": machine.commit or "installed as a package",
            }
        ),
    )


def to_repeat(commands: Sequence[str]) -> Html | None:
    """The calls that do it again."""
    if not commands:
        return None
    return join(tag("h3", "To repeat it"), tag("pre", "\n".join(commands), tabindex="0"))


def raw(record_json: str) -> Html:
    """The record itself, so that no number is only a picture."""
    return tag(
        "section",
        tag(
            "details",
            tag("summary", "All numbers: the record behind this page"),
            tag("pre", json.dumps(json.loads(record_json), indent=2, ensure_ascii=False), tabindex="0"),
        ),
    )


def plain(found: object) -> str:
    """A value as text."""
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
