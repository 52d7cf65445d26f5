"""Where everything of a network's picture stands: texts are measured first, and get room of their own.

Lengths are inches, from the top left corner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from uldm_cli.runs.draw.plot import DEFAULT, Style

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from uldm_cli.runs.architecture import Architecture, Stage

MARGIN = 0.2
LAYER_GAP = 0.022  # between two layers of a stage
SHEET, SHIFT = 0.2, 0.05  # width of one map, and how far the next looks out behind it
PATCH = 0.2  # width of a legend's sign
BETWEEN = 0.28  # two entries of the legend
_GAP = 0.17  # between two columns, at least
_SMALLEST = 0.42  # height of a stage of the smallest size
_WIDEST = 1.6  # width of a stage, however many layers it has
_NARROWEST = 4.8  # width of the picture
SKIP = 0.2  # from the upper edge of a stage to the line that leaves it

WORDS = {
    "convolution": "convolution",
    "residual": "residual block",
    "attention": "self-attention",
    "transformer": "self- and cross-attention",
}


class Ruler:
    """Measures texts as they will be drawn."""

    def __init__(self, style: Style = DEFAULT) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import findfont, get_font

        self.dpi = style.dpi
        self.large, self.size, self.small = (round(style.font_size * factor, 2) for factor in (1.25, 1.0, 0.9))
        self.line = 1.4 * style.font_size / 72
        figure = Figure(dpi=style.dpi)
        self._renderer: Any = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
        self._text = figure.text(0, 0, "", parse_math=False)
        self._glyphs: set[int] = set()
        """What the font has, bold and not."""
        for weight in ("bold", "normal"):
            self._text.set_fontweight(weight)
            glyphs = {*get_font(findfont(self._text.get_fontproperties())).get_charmap()}
            self._glyphs = self._glyphs & glyphs if self._glyphs else glyphs

    def width(self, text: str, size: float, weight: str = "normal") -> float:
        """Of a line."""
        if not text:
            return 0.0
        self._text.set(text=text, fontsize=size, fontweight=weight)
        return float(self._text.get_window_extent(self._renderer).width) / self.dpi

    def shortened(self, text: str, width: float, size: float, weight: str = "normal") -> str:
        """A line that fits: what is too long loses its middle, and what the font lacks is replaced."""
        text = "".join(c if ord(c) in self._glyphs else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
        whole, needed = text, self.width(text, size, weight)
        kept = min(len(text), int(len(text) * 1.5 * width / needed) + 3) if needed > width else 0
        while kept > 2 and self.width(text, size, weight) > width:
            kept -= 1
            text = f"{whole[: kept // 2]}\N{HORIZONTAL ELLIPSIS}{whole[len(whole) - (kept - kept // 2) :]}"
        return text


@dataclass(frozen=True)
class Column:
    """A stage and where it stands."""

    stage: Stage
    body: float
    """Width of what is drawn."""
    flow: float
    """Height of the maps that go through."""
    height: float
    """Of what is drawn."""
    cells: tuple[str, ...]
    """Of the table."""
    caption: tuple[str, ...]
    """Lines above what is drawn."""
    width: float
    """With the texts."""
    x: float = 0.0
    """Of its middle."""

    @property
    def left(self) -> float:
        return self.x - self.body / 2

    @property
    def right(self) -> float:
        return self.x + self.body / 2


@dataclass(frozen=True)
class Part:
    """Successive columns that belong together."""

    lines: tuple[str, ...]
    """Its name."""
    first: int
    last: int


@dataclass(frozen=True)
class Entry:
    """Of the legend."""

    sign: str
    words: str
    width: float


@dataclass(frozen=True)
class Plan:
    """Where everything is; heights are from above."""

    architecture: Architecture
    title: str
    facts: list[str]
    columns: list[Column]
    parts: list[Part]
    heads: list[str]
    """Of the table's rows."""
    legend: list[list[Entry]]
    signals: list[str]
    left: float
    """Where the columns begin."""
    width: float
    centre: float
    """Of the stages."""
    bottom: float
    """Of the highest stage."""
    table: float
    under: float
    """Where the legend begins."""
    height: float


def make_plan(architecture: Architecture, ruler: Ruler) -> Plan:
    """Gives everything its place."""
    columns, heads = _columns(architecture, ruler)
    parts = _parts(columns)
    columns = _room_for_parts(columns, parts, ruler)
    signals = [f"{signal.name} ({signal.width})" for signal in architecture.signals]
    left = MARGIN + max(ruler.width(text, ruler.small) for text in (*heads, *signals)) + 0.25
    gap = max(_GAP, (_NARROWEST - left - MARGIN - sum(c.width for c in columns)) / (len(columns) - 1))
    columns = list(_placed(columns, left, gap))
    width = columns[-1].x + columns[-1].width / 2 + MARGIN
    room = width - 2 * MARGIN
    amount = f"{in_short(architecture.parameters)} parameters"
    facts = _facts([*architecture.facts, amount], room, ruler)
    legend = _wrapped(_legend(architecture, ruler), room)

    above = max(c.height / 2 + len(c.caption) * ruler.line for c in columns)
    if architecture.skips:
        above += SKIP + ruler.line / 2
    centre = MARGIN + 1.3 * ruler.line + len(facts) * ruler.line + 0.2 + above
    bottom = centre + max(c.height for c in columns) / 2
    table = bottom + 0.12 + (0.12 + len(signals) * ruler.line * 1.2 if signals else 0)
    rows = max(len(part.lines) for part in parts) + len(heads)
    under = table + 0.1 + rows * ruler.line + 0.22
    return Plan(
        architecture=architecture,
        title=ruler.shortened(architecture.name, room, ruler.large, "bold"),
        facts=facts,
        columns=columns,
        parts=parts,
        heads=heads,
        legend=legend,
        signals=signals,
        left=left,
        width=width,
        centre=centre,
        bottom=bottom,
        table=table,
        under=under,
        height=under + (len(legend) + 1) * ruler.line + 0.12,
    )


def in_short(amount: int) -> str:
    """A number in three digits: 274M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if amount >= 0.9995 * size:
            scaled = amount / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return str(amount)


def _columns(architecture: Architecture, ruler: Ruler) -> tuple[list[Column], list[str]]:
    """The columns, not yet in place, and what heads the rows of their cells."""
    stages = architecture.stages
    smallest = min(stage.side for stage in stages)
    halvings = math.log2(max(stage.side for stage in stages) / smallest)
    step = min(0.5, max(1.9 / max(halvings, 1), 2.1 * ruler.line))
    attentive = any(stage.heads for stage in stages)
    heads = ["channels", "size", "residual blocks", *["attention heads"] * attentive, "parameters"]
    thinnest = min(stage.channels for stage in stages if stage.layers)
    columns = []
    for stage in stages:
        flow = _SMALLEST + step * math.log2(stage.side / smallest)
        body, height = _body(stage, flow, thinnest)
        cells, caption = tuple(_cells(stage, attentive)), tuple(_caption(stage))
        texts = max(ruler.width(text, ruler.small) for text in (*cells, *caption))
        columns.append(Column(stage, body, flow, height, cells, caption, max(body, texts)))
    return columns, heads


def _body(stage: Stage, flow: float, thinnest: int) -> tuple[float, float]:
    """Width and height of what is drawn of a stage."""
    if stage.kind == "codebook":
        return 0.39, max(flow, 0.65)
    if stage.kind == "posterior":
        return 0.6, max(flow, 0.5)
    if stage.kind == "maps":
        return SHEET + SHIFT * (sheets(stage.channels) + sheets(stage.beside) - 1), flow
    count = sum(layer.kind != "resampling" for layer in stage.layers)
    layer = 0.055 + 0.013 * math.log2(stage.channels / thinnest)
    return min(_WIDEST, count * (layer + LAYER_GAP) - LAYER_GAP), flow


def sheets(channels: int) -> int:
    """Of how many maps a picture is drawn."""
    return min(channels, 4)


def _cells(stage: Stage, attentive: bool) -> Iterator[str]:
    if stage.kind == "posterior":
        yield f"2\N{MULTIPLICATION SIGN}{stage.channels // 2}"
    else:
        yield f"{stage.channels}+{stage.beside}" if stage.beside else str(stage.channels)
    yield f"{stage.side}\N{SUPERSCRIPT TWO}"
    if stage.kind == "layers":
        yield str(stage.blocks)
        yield from [str(stage.heads or "\N{EN DASH}")] * attentive
        yield in_short(stage.parameters)
    else:
        yield from [""] * (1 + attentive)
        yield in_short(stage.parameters) if stage.parameters else ""


def _caption(stage: Stage) -> Iterator[str]:
    if stage.codes:
        yield from (f"{stage.codes:,} codes", f"of length {stage.code_length}")
    if stage.kind == "posterior":
        yield from ("mean and", "log variance")


def _parts(columns: Sequence[Column]) -> list[Part]:
    """A name over one column only has a line a word."""
    parts = []
    for name, group in groupby(range(len(columns)), key=lambda i: columns[i].stage.part):
        numbers = list(group)
        lines = tuple(name.split()) if len(numbers) == 1 else (name,)
        parts.append(Part(lines, numbers[0], numbers[-1]))
    return parts


def _room_for_parts(columns: list[Column], parts: Sequence[Part], ruler: Ruler) -> list[Column]:
    wide = list(columns)
    for part in parts:
        numbers = range(part.first, part.last + 1)
        needed = max(ruler.width(line, ruler.size, "bold") for line in part.lines)
        lacking = needed - sum(columns[i].width for i in numbers) - _GAP * (len(numbers) - 1)
        for i in numbers:
            wide[i] = replace(columns[i], width=columns[i].width + max(0.0, lacking) / len(numbers))
    return wide


def _placed(columns: Sequence[Column], left: float, gap: float) -> Iterator[Column]:
    for column in columns:
        yield replace(column, x=left + column.width / 2)
        left += column.width + gap


def _facts(facts: Sequence[str], room: float, ruler: Ruler) -> list[str]:
    """Lines of facts that fit."""
    lines: list[str] = []
    for fact in facts:
        longer = f"{lines[-1]}  \N{MIDDLE DOT}  {fact}" if lines else fact
        if lines and ruler.width(longer, ruler.size) <= room:
            lines[-1] = longer
        else:
            lines.append(ruler.shortened(fact, room, ruler.size))
    return lines


def _legend(architecture: Architecture, ruler: Ruler) -> list[Entry]:
    kinds = [layer.kind for stage in architecture.stages for layer in stage.layers]
    signs: list[tuple[str, str]] = [(kind, words) for kind, words in WORDS.items() if kind in kinds]
    if "resampling" in kinds:
        signs.append(("resampling", f"half or double the size ({architecture.resampling})"))
    if any(stage.beside for stage in architecture.stages):
        signs.append(("condition", "condition"))
    if architecture.skips:
        signs.append(("skip", f"skip connections, {architecture.skips[0].count} at each size"))
    return [Entry(sign, words, PATCH + 0.07 + ruler.width(words, ruler.small)) for sign, words in signs]


def _wrapped(entries: Sequence[Entry], room: float) -> list[list[Entry]]:
    lines: list[list[Entry]] = [[]]
    used = 0.0
    for entry in entries:
        if lines[-1] and used + entry.width > room:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += entry.width + BETWEEN
    return lines
