"""One figure while it is drawn by matplotlib, and what makes an SVG of it that is at home both in a page and alone.

The colours of ink, grid and paper are CSS variables of the page around (``--ink``, ``--mute``, ``--line``, ``--paper``), so
that a figure is read in light and in dark; renderers without CSS variables see the light ones.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from dsbs.formatting import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTE, LINE, PAPER = "#1d2330", "#5c6678", "#d7dce5", "#ffffff"
_VARIABLES = {INK: "--ink", MUTE: "--mute", LINE: "--line", PAPER: "--paper"}
_DARK = {"--ink": "#e6e9ef", "--mute": "#9aa5b8", "--line": "#39414f", "--paper": "#14171d"}
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_FONTS = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_LONGEST = 36  # characters of a name from data in a figure


@dataclass(frozen=True, slots=True)
class Figure:
    """A finished figure: ``svg`` is one <svg> element with ids under ``name``; ``title`` and ``caption`` are plain text."""

    name: str
    title: str
    caption: str
    svg: str

    @property
    def alone(self) -> str:
        """The figure as a file of its own, which follows the reader's light or dark scheme by itself."""
        light = " ".join(f"{variable}: {color};" for color, variable in _VARIABLES.items())
        dark = " ".join(f"{variable}: {color};" for variable, color in _DARK.items())
        style = (
            f"<style>svg {{ {light} background: var(--paper) }} "
            f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
        )
        opening = self.svg.index(">") + 1  # of attributes that escape theirs
        return f'<?xml version="1.0" encoding="utf-8"?>\n{self.svg[:opening]}{style}{self.svg[opening:]}\n'


_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar in a label is a dollar
    "font.family": "sans-serif",
    "font.sans-serif": [
        "DejaVu Sans"
    ],  # comes with matplotlib and is wider than what pages are read in
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTE,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.handlelength": 2.4,
    "legend.fontsize": 9,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.7,
    "lines.markersize": 6,
    "text.color": INK,
    "xtick.color": MUTE,
    "ytick.color": MUTE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@contextmanager
def drawing(
    name: str,
    *,
    width: float = 5.4,
    height: float = 3.3,
    panels: int = 1,
    columns: int = 1,
    share: str = "",
) -> Iterator[Sheet]:
    """A sheet of ``columns`` by as many rows as ``panels`` need, ``height`` inches each, with shared axes ("x", "y", "xy")."""
    import matplotlib as mpl

    # the salt of ids is the name: equal results give an equal file, and different figures do not share an id
    with mpl.rc_context(_SETTINGS | {"svg.hashsalt": name}):
        yield Sheet(name, (width, height), panels, min(columns, panels), share)


def is_ours(path: Path) -> bool:
    """Whether a file is a figure that was written here: its element bears the file's name and our caption's."""
    with path.open(encoding="utf-8", errors="replace") as file:
        opening = file.read(1000)
    return f'id="{path.stem}"' in opening and f'aria-describedby="{path.stem}-caption"' in opening


class Sheet:
    """A figure's panels while they are drawn on."""

    def __init__(
        self, name: str, size: tuple[float, float], panels: int, columns: int, share: str
    ) -> None:
        from matplotlib.figure import Figure as Drawing

        self.name = name
        self._tips: dict[str, str] = {}
        rows = -(-panels // columns)
        self._drawing = Drawing(figsize=(size[0], size[1] * rows), layout="constrained")
        self._drawing.patch.set_visible(False)
        grid = list(
            self._drawing.subplots(
                rows, columns, squeeze=False, sharex="x" in share, sharey="y" in share
            ).flat
        )
        self.axes: list[Axes] = grid[:panels]
        for spare in grid[panels:]:
            spare.remove()
        self.first_column, self.last_row = self.axes[::columns], self.axes[-columns:]
        for axes in self.last_row:  # what stands above an empty place bears its own labels
            axes.xaxis.set_tick_params(labelbottom=True)

    def tip(self, artist: Any, text: str) -> None:
        """Let ``artist`` say ``text`` where it is pointed at."""
        self._tips[f"tip{len(self._tips)}"] = text
        artist.set_gid(f"tip{len(self._tips) - 1}")

    def legend(self, entries: Sequence[tuple[Any, str]]) -> None:
        """A legend below all panels, in as many columns as its names leave room for; the figure grows by it."""
        handles, names = zip(*entries, strict=True)
        width, height = self._drawing.get_size_inches()
        each = 0.58 + 0.07 * max(map(len, names))  # inches of a picture and its name
        columns = max(1, min(len(names), 3, int((width - 0.2) / each)))
        self._drawing.set_size_inches(width, height + 0.1 + 0.19 * -(-len(names) // columns))
        self._drawing.legend(handles, names, loc="outside lower center", ncols=columns)

    def finish(self, title: str, caption: str) -> Figure:
        text = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Glyph .* missing from font"
            )  # the reader's font has to have it
            self._drawing.savefig(text, format="svg", transparent=True)
        return Figure(self.name, title, caption, self._at_home(text.getvalue(), title, caption))

    def _at_home(self, drawn: str, title: str, caption: str) -> str:
        """matplotlib's file as one element that neither changes nor is changed by what stands beside it."""
        ElementTree.register_namespace("", _SVG)
        ElementTree.register_namespace("xlink", _LINK)
        root = ElementTree.fromstring(drawn)
        for parent in list(root.iter()):
            for child in list(parent):
                if child.tag.rpartition("}")[2] in (
                    "metadata",
                    "style",
                ):  # a style would hold for the whole page
                    parent.remove(child)
        for element in root.iter():
            _style(element)
            for key in ("d", "x", "y", "transform", "width", "height"):
                if key in element.attrib:
                    element.set(
                        key,
                        _NUMBER.sub(lambda found: f"{float(found[0]):.2f}", element.attrib[key]),
                    )
            if element.get("id") in self._tips:
                words = ElementTree.Element(f"{{{_SVG}}}title")
                words.text = self._tips[element.attrib["id"]]
                element.insert(0, words)
        self._own_ids(root)
        box = root.attrib["viewBox"].split()
        for key in ("version", "width", "height"):
            root.attrib.pop(key, None)
        root.attrib |= {
            "width": f"{float(box[2]) * 4 / 3:.0f}",  # points as CSS pixels
            "height": f"{float(box[3]) * 4 / 3:.0f}",
            "id": self.name,
            "role": "img",
            "aria-labelledby": f"{self.name}-title",
            "aria-describedby": f"{self.name}-caption",
            "font-family": _FONTS,
            "stroke-linejoin": "round",  # as matplotlib's own style says
            "stroke-linecap": "butt",
        }
        for place, (tag, words_, mark) in enumerate(
            (("title", title, "title"), ("desc", caption, "caption"))
        ):
            element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{self.name}-{mark}"})
            element.text = words_
            root.insert(place, element)
        return ElementTree.tostring(root, encoding="unicode")

    def _own_ids(self, root: ElementTree.Element) -> None:
        """Only ids that are referred to stay, under the figure's name."""
        used = set(
            re.findall(r'(?:url\(|href=")#([^)"]+)', ElementTree.tostring(root, encoding="unicode"))
        )
        for element in root.iter():
            own = element.attrib.pop("id", None)
            if own in used:
                element.set("id", f"{self.name}-{own}")
            for key, value in element.attrib.items():
                if key == f"{{{_LINK}}}href":
                    element.set(key, f"#{self.name}-{value[1:]}")
                elif "url(#" in value:
                    element.set(key, value.replace("url(#", f"url(#{self.name}-"))


def _style(element: ElementTree.Element) -> None:
    """Colours of the page as variables with a plain attribute to fall back on; the font is the page's."""
    if "style" not in element.attrib:
        return
    kept = []
    for declaration in element.attrib.pop("style").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if not key or key == "font-family":
            continue
        if key in ("fill", "stroke") and value in _VARIABLES:
            element.set(key, value)
            value = f"var({_VARIABLES[value]}, {value})"
        kept.append(f"{key}: {value}")
    element.set("style", "; ".join(kept))


def short(text: str, most: int = _LONGEST) -> str:
    """A name from data, fit for a legend or an axis."""
    return one_line(text, most)
