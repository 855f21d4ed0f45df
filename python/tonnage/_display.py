"""What a checkpoint is, at a glance: one screen of text, or a tree that folds in a notebook.

Names come from strangers. In text, control characters and those that change the direction of
writing are shown as escapes; in HTML, everything is escaped besides.
"""

from __future__ import annotations

import html as _html
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tonnage._checkpoint import Checkpoint

#: Lines of tensors in the text, children of a node and nodes in all in the tree: what a screen or a
#: notebook's file can bear.
TEXT_ROWS = 16
TREE_CHILDREN = 200
TREE_NODES = 5000
#: Levels of modules that are told apart; deeper names stay in one piece.
TREE_DEPTH = 12
#: Characters of a name that are shown.
NAME_LENGTH = 120


def plain(text: str, limit: int = 4 * NAME_LENGTH) -> str:
    """Text that shows what is in it and does nothing to the screen."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(c) for c in text)


def _shown(char: str) -> str:
    # Cc control, Cf format (bidi marks, zero width), Cs surrogate, Co private, Cn unassigned, Zl Zp
    # lines.
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        code = ord(char)
        return f"\\x{code:02x}" if code < 256 else f"\\u{{{code:x}}}"
    return char


def size(nbytes: int) -> str:
    """Bytes for people: `"1.50 GB"` (10^9)."""
    return _scaled(nbytes, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(number: int) -> str:
    """A number for people: `"7.62 G"`."""
    return _scaled(number, 1000, ("", "k", "M", "G", "T", "P"))


def _scaled(number: int, base: int, units: tuple[str, ...]) -> str:
    value, unit = float(number), 0
    while value >= base and unit + 1 < len(units):
        value, unit = value / base, unit + 1
    text = f"{value:.3g}" if unit and value < 100 else f"{value:.0f}"
    return f"{text} {units[unit]}".rstrip()


class _Row(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def _rows(checkpoint: Checkpoint) -> list[_Row]:
    handle = checkpoint._handle
    return [_Row(*handle.row(at)[:4]) for at in range(len(checkpoint))]


def _dtypes(rows: Iterable[_Row]) -> list[tuple[str, int, int]]:
    """Dtype, tensors, bytes; the largest first."""
    found: dict[str, list[int]] = {}
    for row in rows:
        entry = found.setdefault(row.dtype, [0, 0])
        entry[0] += 1
        entry[1] += row.nbytes
    dtypes = [(name, tensors, nbytes) for name, (tensors, nbytes) in found.items()]
    return sorted(dtypes, key=lambda dtype: (-dtype[2], dtype[0]))


def _head(checkpoint: Checkpoint, rows: list[_Row]) -> str:
    files = len(checkpoint.files)
    several = f"{files} files, " if files != 1 else ""
    return (
        f"{plain(checkpoint.label)}: {several}{len(rows):,} tensors, "
        f"{count(checkpoint.parameters)} parameters, {size(checkpoint.nbytes)}"
    )


def text(checkpoint: Checkpoint) -> str:
    """The `repr`: what it is, its dtypes, metadata, and the first and last tensors."""
    rows = _rows(checkpoint)
    lines = [f"Checkpoint {_head(checkpoint, rows)}"]
    dtypes = _dtypes(rows)
    if dtypes:
        parts = [f"{plain(d, 24)} {size(nbytes)} in {n:,}" for d, n, nbytes in dtypes[:6]]
        more = f" · {len(dtypes) - 6} more" if len(dtypes) > 6 else ""
        lines.append("  dtypes    " + " · ".join(parts) + more)
    metadata = list(checkpoint.metadata.items())
    if metadata:
        pairs = [f"{plain(key, 40)}={plain(value, 40)}" for key, value in metadata[:4]]
        more = f" · {len(metadata) - 4} more" if len(metadata) > 4 else ""
        lines.append("  metadata  " + " · ".join(pairs) + more)
    for note in checkpoint.notes[:3]:
        lines.append(f"  note      {plain(note.text, 100)}")
    lines += _table(rows)
    return "\n".join(lines)


def _table(rows: list[_Row]) -> list[str]:
    if len(rows) <= TEXT_ROWS:
        shown: list[_Row | None] = list(rows)
    else:
        tail = 3
        shown = [*rows[: TEXT_ROWS - tail - 1], None, *rows[-tail:]]
    names = [plain(row.name, 60) for row in shown if row is not None]
    width = max((len(name) for name in names), default=0)
    lines = []
    for row in shown:
        if row is None:
            lines.append(f"  … {len(rows) - TEXT_ROWS + 1:,} more")
            continue
        dtype = plain(row.dtype, 16)
        lines.append(f"  {plain(row.name, 60):<{width}}  {dtype:<8} {_shape(row)}")
    return lines


def _shape(row: _Row) -> str:
    shape = row.shape if len(row.shape) <= 8 else (*row.shape[:8], "…")
    return "[" + ", ".join(str(extent) for extent in shape) + "]"


class _Node:
    """A module of the tree, or a tensor where it has a row."""

    __slots__ = ("children", "nbytes", "row", "tensors")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.row: _Row | None = None
        self.nbytes = 0
        self.tensors = 0


def _tree(rows: list[_Row]) -> _Node:
    root = _Node()
    for row in rows:
        node = root
        node.nbytes += row.nbytes
        node.tensors += 1
        for part in row.name.split(".", TREE_DEPTH):
            node = node.children.setdefault(part, _Node())
            node.nbytes += row.nbytes
            node.tensors += 1
        node.row = row
    return root


#: No script, no address, nothing loaded: a notebook may show it from a stranger's file.
_STYLE = "font-family:monospace;font-size:90%;line-height:1.5"


def html(checkpoint: Checkpoint) -> str:
    """The notebook's view: a summary, and the modules as a tree that folds."""
    if checkpoint._open_handle is None:
        return f"<pre>{_escape(repr(checkpoint))}</pre>"
    rows = _rows(checkpoint)
    out = [f'<div style="{_STYLE}"><b>{_escape(_head(checkpoint, rows))}</b>']
    out.append("<table><tr><th>dtype</th><th>tensors</th><th>size</th></tr>")
    for dtype, number, nbytes in _dtypes(rows)[:12]:
        out.append(
            f"<tr><td>{_escape(dtype, 24)}</td><td>{number:,}</td><td>{size(nbytes)}</td></tr>"
        )
    out.append("</table>")
    metadata = list(checkpoint.metadata.items())
    if metadata:
        out.append(f"<details><summary>metadata ({len(metadata):,})</summary><table>")
        for key, value in metadata[:TREE_CHILDREN]:
            out.append(f"<tr><td>{_escape(key)}</td><td>{_escape(value, 500)}</td></tr>")
        out.append("</table></details>")
    for note in checkpoint.notes[:10]:
        out.append(f"<div>note: {_escape(note.text, 300)}</div>")
    _html_children(_tree(rows), out, [TREE_NODES])
    out.append("</div>")
    return "".join(out)


def _escape(text: str, limit: int = NAME_LENGTH) -> str:
    return _html.escape(plain(text, limit), quote=True)


def _html_children(node: _Node, out: list[str], left: list[int]) -> None:
    """The children of a node. `left` counts down how many nodes may still be shown."""
    out.append('<div style="margin-left:1.5em">')
    hidden = max(0, len(node.children) - TREE_CHILDREN)
    for name, child in list(node.children.items())[:TREE_CHILDREN]:
        if left[0] <= 0:
            hidden += 1
            continue
        left[0] -= 1
        _html_node(name, child, out, left)
    if hidden:
        out.append(f"<div>… {hidden:,} more</div>")
    out.append("</div>")


def _html_node(name: str, node: _Node, out: list[str], left: list[int]) -> None:
    label = f"<b>{_escape(name)}</b>"
    if node.row is not None:
        row = node.row
        shape = _escape(_shape(row))
        label += f" {_escape(row.dtype, 24)} {shape} {size(row.nbytes)}"
    if not node.children:
        out.append(f"<div>{label}</div>")
        return
    out.append(
        f"<details><summary>{label} <i>{node.tensors:,} tensors, {size(node.nbytes)}</i></summary>"
    )
    _html_children(node, out, left)
    out.append("</details>")
