"""YAML that remembers on which line each key stands, so that a mistake can be shown where it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

Path_ = tuple[str | int, ...]


@dataclass(slots=True)
class Located:
    """A parsed document: its plain ``data``, the 1-based line of every path, the scalar's own spelling, problems met."""

    data: Any
    lines: dict[Path_, int] = field(default_factory=dict)
    spelling: dict[Path_, str] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def line(self, path: Path_) -> int | None:
        """Line of ``path``, or of its nearest written ancestor."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def load_located(text: str) -> Located:
    """Parse one YAML document. Raises ``yaml.YAMLError`` where the text is not YAML."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        located = Located(data=None)
        if node is not None:
            _walk(node, (), located)
            located.data = loader.construct_document(node)
    finally:
        loader.dispose()
    return located


def _walk(node: yaml.Node, path: Path_, out: Located, above: tuple[yaml.Node, ...] = ()) -> None:
    if any(node is one for one in above):
        raise yaml.composer.ComposerError(None, None, "an alias that holds itself", node.start_mark)
    above = (*above, node)
    out.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            child = (*path, str(key_node.value))
            if child in out.lines:  # YAML itself would silently keep the last one
                out.problems.append(
                    (line, f"{dotted(child)} is given twice (first on line {out.lines[child]})")
                )
            out.lines[child] = line
            _walk(value_node, child, out, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), out, above)
    elif isinstance(node, yaml.ScalarNode):
        out.spelling[path] = node.value


def dotted(path: Path_) -> str:
    """``("train", "seeds", 0)`` as ``train.seeds[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
