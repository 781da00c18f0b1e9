"""Line charts as inline SVG.

Owns: the drawing: frame, grid, ticks, lines, bands and hover texts. Colours are classes of the page's style sheet, so
a chart is right in light and in dark. Text is in units of the drawing, which is about as wide as the cell it is put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.metrics.curves import Floats, Series, smooth
from trainer.report.markup import Child, Markup, join, tag
from trainer.report.scale import Axis, number, thin, tick_labels


@dataclass(frozen=True)
class Line:
    """A curve: what it is called, its points, and the class of its colour."""

    label: str
    series: Series
    style: str
    raw: Series | None = None
    """What `series` smooths; drawn faintly behind it."""
    error: Series | None = None
    """Half the width of a band around it, at (some of) its steps."""


@dataclass(frozen=True)
class Size:
    """How large a chart is and how much it shows."""

    width: int
    height: int
    left: int
    x_ticks: int
    y_ticks: int
    points: int
    hovers: int


LARGE = Size(440, 210, left=44, x_ticks=7, y_ticks=6, points=400, hovers=60)
MEDIUM = Size(320, 130, left=40, x_ticks=5, y_ticks=4, points=200, hovers=30)
SMALL = Size(190, 92, left=34, x_ticks=4, y_ticks=3, points=80, hovers=10)
TOP, RIGHT, BOTTOM = 7, 8, 17
FEW = 12
"""Points that are also drawn as dots, up to so many."""


def smoothed(label: str, raw: Series, style: str) -> Line:
    """A noisy curve, smoothed."""
    return Line(label, smooth(raw), style, raw)


def line_chart(
    title: str, lines: Sequence[Line], last_step: int, size: Size, log: bool = False, reference: float | None = None
) -> Markup:
    """Draw the lines that have points over the windows 0..`last_step`.

    Args:
        title: what is drawn, for hovering and screen readers.
        log: a logarithmic scale; values that are not positive are left out.
        reference: a dashed line at this value.
    """
    shown = [line for line in (_positive(line) if log else line for line in lines) if len(line.series.steps)]
    low, high = _limits(shown, log, reference)
    x = Axis(0, max(last_step, 1), size.left, size.width - RIGHT)
    y = Axis(low, high, size.height - BOTTOM, TOP, log)
    inside = [_reference(y, x, reference)] if reference is not None else []
    inside += [_line(line, x, y, size, len(shown) <= (1 if size is SMALL else 3)) for line in shown]
    # An inner drawing clips what outliers and bands leave outside.
    box = (size.left - 3, TOP - 4, size.width - size.left + 3, size.height - BOTTOM - TOP + 8)
    view = " ".join(map(str, box))
    plot = tag("svg", *inside, x=box[0], y=box[1], width=box[2], height=box[3], viewBox=view)
    return tag(
        "svg", tag("title", title), _axes(x, y, size), plot,
        class_="chart", viewBox=f"0 0 {size.width} {size.height}", role="img",
    )  # fmt: skip


def _positive(line: Line) -> Line:
    steps, values = line.series
    return Line(line.label, Series(steps[values > 0], values[values > 0]), line.style)


def _limits(lines: Sequence[Line], log: bool, reference: float | None) -> tuple[float, float]:
    """Room for the whole of every curve, and for all but rare outliers of raw points and bands."""
    found = [] if reference is None else [reference]
    for line in lines:
        found += [line.series.values.min(), line.series.values.max()]
        if line.raw is not None:
            found += list(np.percentile(line.raw.values, [1, 99]))
        if line.error is not None and len(line.error.steps):
            below, above = _edges(line, line.error)
            found += [np.percentile(below, 20), np.percentile(above, 80)]
    low, high = (float(min(found)), float(max(found))) if found else (0.0, 1.0)
    if log:
        return (low / 1.15, high * 1.15) if low > 0 else (0.1, 1.0)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    # An axis that would begin just below 0 begins at 0.
    return (0.0 if low >= 0 and low < pad else low - pad), high + pad


def _edges(line: Line, error: Series) -> tuple[Floats, Floats]:
    middle = np.interp(error.steps, *line.series)
    return middle - error.values, middle + error.values


def _axes(x: Axis, y: Axis, size: Size) -> Markup:
    parts: list[Child] = []
    at = y.ticks(size.y_ticks)
    for place, text in zip(y(np.array(at)), tick_labels(at), strict=True):
        parts.append(tag("line", x1=x.start, x2=x.end, y1=_n(place), y2=_n(place)))
        parts.append(tag("text", text, x=x.start - 5, y=_n(place + 3.3), text_anchor="end"))
    at = [tick for tick in x.ticks(size.x_ticks) if tick == int(tick)]
    for place, text in zip(x(np.array(at)), tick_labels(at), strict=True):
        # The last label ends with the drawing, which would cut it.
        last = place > x.end - 6
        at_x, anchor = (size.width, "end") if last else (_n(place), "middle")
        parts.append(tag("text", text, x=at_x, y=size.height - 4, text_anchor=anchor))
    parts.append(tag("line", class_="axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start))
    return tag("g", *parts, class_="axes")


def _line(line: Line, x: Axis, y: Axis, size: Size, with_raw: bool) -> Markup:
    shown = thin(line.series, size.points)
    parts: list[Child] = [tag("title", line.label)]
    if line.error is not None and len(line.error.steps) > 1:
        parts.append(_band(line, line.error, x, y, size))
    few = len(line.series.steps) <= FEW
    if line.raw is not None and with_raw and not few:
        parts.append(tag("path", class_="raw", d=_path(thin(line.raw, size.points), x, y)))
    parts.append(tag("path", class_="line", d=_path(shown, x, y)))
    hovers = thin(shown, size.hovers)
    for px, py, step, value in zip(x(hovers.steps), y(hovers.values), *hovers, strict=True):
        text = tag("title", f"{line.label}, window {int(step):,}: {number(value)}")
        parts.append(tag("circle", text, class_="dot" if few else "hover", cx=_n(px), cy=_n(py), r=2.4 if few else 5))
    return tag("g", *parts, class_=line.style)


def _band(line: Line, error: Series, x: Axis, y: Axis, size: Size) -> Markup:
    kept = np.unique(np.linspace(0, len(error.steps) - 1, min(len(error.steps), size.points)).astype(int))
    below, above = _edges(line, error)
    there = _path(Series(error.steps[kept], above[kept]), x, y)
    back = _path(Series(error.steps[kept][::-1], below[kept][::-1]), x, y)
    return tag("path", class_="band", d=f"{there}L{back[1:]}Z")


def _reference(y: Axis, x: Axis, value: float) -> Markup:
    place = _n(float(y(np.array(value))))
    return tag("line", tag("title", number(value)), class_="reference", x1=x.start, x2=x.end, y1=place, y2=place)


def _path(series: Series, x: Axis, y: Axis) -> str:
    points = zip(x(series.steps), y(series.values), strict=True)
    return "M" + "L".join(f"{_n(px)},{_n(py)}" for px, py in points)


def _n(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")


def figure(caption: str, chart: Child, values: Sequence[tuple[str, str]] = (), **attributes: Child) -> Markup:
    """A chart under its name; `values` are (class, text) at the right: what each line ends at."""
    ends = [tag("b", text, class_=style) for style, text in values]
    name = tag("span", caption, class_="name", title=caption)
    return tag("figure", tag("figcaption", name, tag("span", join(*ends), class_="ends")), chart, **attributes)
