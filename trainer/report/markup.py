"""HTML and SVG as text that cannot be injected into.

Owns: escaping. Everything that is not `Markup` already is escaped when it becomes part of an element, so the modules
that describe a page never think about it. Elements come out well-formed, as XML is.
"""

from __future__ import annotations

import html
import re

VOID = frozenset({"meta", "br"})
"""HTML elements without an end tag; SVG shapes are ended in the same way."""
_SHAPES = frozenset({"path", "line", "rect", "circle"})
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What neither XML nor UTF-8 can hold; a damaged or hostile name may."""


class Markup(str):
    """Text that is markup: checked or made here, never taken from a file."""

    __slots__ = ()


Child = str | int | float | None


def escape(text: object) -> Markup:
    """`text` as it is to be read, for an element's content or an attribute in double quotes."""
    return Markup(html.escape(_NOT_TEXT.sub("\ufffd", str(text)), quote=True))


def tag(name: str, /, *children: Child, **attributes: Child) -> Markup:
    """An element. `class_` is `class`, `_` in other names is `-`; attributes and children that are None are skipped."""
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join(*children)
    if name in VOID or (name in _SHAPES and not inside):
        return Markup(f"<{name}{named}/>")
    return Markup(f"<{name}{named}>{inside}</{name}>")


def join(*children: Child) -> Markup:
    """The children one after another."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))
