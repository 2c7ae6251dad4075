"""What the page draws by itself, as HTML and SVG: who runs which step, the triangle of three shares, the trade-off curve."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

from tstitch.schedule import StitchSchedule

WORDS = {"S": "small", "B": "base", "L": "large"}
COLOURS = {"S": "#10b981", "B": "#f59e0b", "L": "#6366f1"}


class Point(NamedTuple):
    """A schedule in the trade-off plot."""

    name: str
    speed_up: float  # against the large model alone
    loss: float  # of quality: lower is better


def steps_strip(schedule: StitchSchedule, letters: Sequence[str], num_steps: int) -> str:
    """A bar with a cell for each step, in the colour of its model, noisiest first."""
    legs = schedule.legs(num_steps)
    parts = []
    for leg in legs:
        letter, count = letters[leg.denoiser], leg.stop - leg.start
        parts.append(f'<div class="leg" style="flex:{count};background-color:{COLOURS[letter]};--steps:{count}">{count} {WORDS[letter]}</div>')
    return f'<div class="strip"><div class="bar">{"".join(parts)}</div><div class="ends"><span>noise</span><span>picture</span></div></div>'


def triangle(shares: Sequence[float]) -> str:
    """Three shares that sum to 1 as a point in a triangle whose corners are one model alone."""
    corners = {"S": (20, 128), "B": (100, 14), "L": (180, 128)}
    x, y = (sum(share * corner[axis] for share, corner in zip(shares, corners.values(), strict=True)) for axis in (0, 1))
    outline = " ".join(f"{cx},{cy}" for cx, cy in corners.values())
    lines = "".join(
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{cx}" y2="{cy}" stroke="{COLOURS[letter]}" stroke-width="{1 + 5 * share:.1f}" stroke-linecap="round"/>'
        for (letter, (cx, cy)), share in zip(corners.items(), shares, strict=True)
    )
    names = "".join(
        f'<text x="{cx}" y="{cy + (-5 if letter == "B" else 16)}" text-anchor="middle" fill="currentColor">{WORDS[letter]} {share:.0%}</text>'
        for (letter, (cx, cy)), share in zip(corners.items(), shares, strict=True)
    )
    return (
        f'<svg class="triangle" viewBox="0 -6 200 154" role="img"><polygon points="{outline}" fill="none" stroke="currentColor" stroke-opacity="0.35"/>'
        f'{lines}<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="currentColor"/>{names}</svg>'
    )


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    step = next(s for e in range(-4, 6) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if (high - low) / s <= count)
    first = int(low / step) + (low > int(low / step) * step)
    return [k * step for k in range(first, int(high / step) + 1)]


def front(points: Sequence[Point]) -> list[Point]:
    """The points than which no other is both faster and better, slowest first."""
    best = [p for p in points if not any(q.speed_up >= p.speed_up and q.loss <= p.loss and q != p and q[1:] != p[1:] for q in points)]
    return sorted(best, key=lambda p: p.speed_up)


def tradeoff(points: Sequence[Point], chosen: str, quality: str, source: str) -> str:
    """Quality against speed-up, the chosen schedule marked, a line through those that no other beats; a point shows its numbers under the pointer.

    Args:
        chosen: name of the schedule to mark; it may be none of the points'.
        quality: what `Point.loss` is.
        source: where the numbers come from, one short sentence.
    """
    if not points:
        return '<div class="plot empty">The trade-off appears here: press “All ratios”.</div>'
    width, height, left, right, top, bottom = 380, 320, 46, 12, 12, 42
    xs, ys = [p.speed_up for p in points], [p.loss for p in points]
    x_low, x_high = min(1.0, *xs), max(*xs, 1.1)
    y_low, y_high = min(ys), max(ys)
    margin = 0.08 * (y_high - y_low) or 1.0
    y_low, y_high = max(0.0, y_low - margin) if y_low >= 0 else y_low - margin, y_high + margin
    x_low, x_high = x_low - 0.03 * (x_high - x_low), x_high + 0.03 * (x_high - x_low)

    def at(speed_up: float, loss: float) -> tuple[float, float]:
        x = left + (speed_up - x_low) / (x_high - x_low) * (width - left - right)
        return x, height - bottom - (loss - y_low) / (y_high - y_low) * (height - top - bottom)

    grid = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/><text x="{x:.1f}" y="{height - bottom + 15}" text-anchor="middle">{tick:g}x</text>'
        for tick in _ticks(x_low, x_high, 6)
        for x in [at(tick, y_low)[0]]
    ) + "".join(
        f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/><text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        for tick in _ticks(y_low, y_high)
        for y in [at(x_low, tick)[1]]
    )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p.speed_up, p.loss) for p in front(points)))
    dots = "".join(
        f'<circle class="{"dot chosen" if p.name == chosen else "dot"}" cx="{x:.1f}" cy="{y:.1f}" r="{8 if p.name == chosen else 5}">'
        f"<title>{html.escape(p.name)}: {p.speed_up:.2f} times as fast, {html.escape(quality)} {p.loss:.3g}</title></circle>"
        for p in sorted(points, key=lambda p: p.name == chosen)  # the chosen one on top
        for x, y in [at(p.speed_up, p.loss)]
    )
    return (
        f'<div class="plot"><svg viewBox="0 0 {width} {height}" role="img"><g class="grid">{grid}</g><polyline points="{path}"/>{dots}'
        f'<text class="axis" x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">speed-up against the large model alone</text>'
        f'<text class="axis" transform="translate(12 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">{html.escape(quality)}</text>'
        f'</svg><div class="source">{html.escape(source)}</div></div>'
    )
