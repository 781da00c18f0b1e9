"""From numbers to axes: ticks, short numbers, and curves with fewer points that look the same.

Owns: which values an axis names and how numbers are written on the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.metrics.curves import Floats, Series

MINUS = "\u2212"


@dataclass(frozen=True)
class Axis:
    """Values `low`..`high` laid over `start`..`end` of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: Floats) -> Floats:
        low, high = self.low, self.high
        if self.log:
            values, low, high = np.log(np.maximum(values, self.low / 10)), math.log(low), math.log(high)
        return np.asarray(self.start + (values - low) / (high - low) * (self.end - self.start))

    def ticks(self, most: int) -> list[float]:
        return log_ticks(self.low, self.high, most) if self.log else ticks(self.low, self.high, most)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten) in `low`..`high`, evenly spaced."""
    power = math.floor(math.log10((high - low) / max(most, 1)))
    for factor in (1, 2, 5, 10, 20, 50, 100):
        step = factor * 10.0**power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [
                round(i * step, max(0, -power) + 2) if abs(power) < 200 else i * step for i in range(first, last + 1)
            ]
    return []


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` of 1, 2, 5 x 10^n in `low`..`high`, with fewer of each power, or fewer powers, where need be."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) <= most:
            return found if len(found) > 1 else ticks(low, high, most)
    return found[:: math.ceil(len(found) / most)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """As many decimals as tell the ticks of an axis apart; thousands as k, very small numbers as 2e-5."""
    largest = max((abs(v) for v in values), default=0.0)
    if largest == 0 or not 1e-3 <= largest < 1e9:
        return [number(v, 3) for v in values]
    scale, unit = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    for decimals in range(5):
        texts = [f"{v / scale:.{decimals}f}" for v in values]
        if all(abs(float(t) * scale - v) <= 1e-6 * largest for t, v in zip(texts, values, strict=True)):
            break
    return [_minus(f"{t}{unit}" if float(t) else "0") for t in texts]


def number(value: float, digits: int = 4) -> str:
    """A number for people, in about `digits` significant ones."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 10 ** max(digits, 6) or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return _minus(f"{mantissa}e{int(exponent)}")
    if abs(value) >= 1000:
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:.{digits}g}")


def short(value: float) -> str:
    """A number in three digits, for a caption."""
    return number(value, 3)


def score(value: float | None, percent: bool, sign: bool = False) -> str:
    """A metric as tables show it: in percent with one decimal, a perplexity as it is; `-` where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if percent:
        return _minus(f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}")
    return ("+" if sign and value > 0 else "") + number(value)


def thin(series: Series, most: int) -> Series:
    """At most `most` points that keep the shape: of each stretch the one that spans the largest triangle with the last
    point kept and the mean of the stretch that follows (Steinarsson 2013, LTTB). First and last stay."""
    steps, values = series
    if len(steps) <= most:
        return series
    edges = np.linspace(1, len(steps) - 1, most - 1).astype(int)
    kept = [0]
    for i in range(most - 2):
        here = slice(edges[i], edges[i + 1])
        after = slice(edges[i + 1], edges[i + 2]) if i + 2 < len(edges) else slice(len(steps) - 1, len(steps))
        x, y = steps[after].mean(), values[after].mean()
        x0, y0 = steps[kept[-1]], values[kept[-1]]
        area = np.abs((x0 - x) * (values[here] - y0) - (x0 - steps[here]) * (y - y0))
        kept.append(edges[i] + int(area.argmax()))
    kept.append(len(steps) - 1)
    return Series(steps[kept], values[kept])


def _minus(text: str) -> str:
    """A minus sign as wide as a plus."""
    return text.replace("-", MINUS, 1) if text.startswith("-") else text
