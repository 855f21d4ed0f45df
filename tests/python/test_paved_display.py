"""`repr` and the notebook's view: one screen, whatever a stranger's file holds, and nothing gets
out.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import tonnage
from paved_data import content, write_model

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</details></div><b onmouseover=x>",
    "&lt;already&gt;",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.exe",
    "line\nbreak\r\0",
    "a" * 5000,
    "".join(f".{i}" for i in range(3000)),
    "'single' \"double\" `back`",
    "",
    "...",
]
ALLOWED = {"div", "b", "i", "table", "tr", "td", "th", "details", "summary", "pre"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_the_text_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, format="pt")
    text = repr(tonnage.open(path))
    for part in (str(path), "7 tensors", "F32", "F16", "format=pt", "embed.weight", "[16, 8]"):
        assert part in text
    assert len(text.splitlines()) <= 24


def test_the_text_of_many_tensors_and_files_is_one_screen() -> None:
    rows = {f"layers.{i}.w": ("F32", [1 << 4], bytes(64)) for i in range(4000)}
    metadata = {"__metadata__": {f"key {i}": "v" * 300 for i in range(100)}}
    first = tonnage.open([content(rows, **metadata), content({"last": ("U8", [2], b"ab")})])
    text = repr(first)
    assert "2 files" in text
    assert "4,001 tensors" in text
    assert "layers.0.w" in text
    assert "last" in text
    assert "more" in text
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) < 300
    assert len(first._repr_html_()) < 1_000_000


def test_the_tree_folds_by_module(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, format="pt")
    reader = read(tonnage.open(path)._repr_html_())
    assert {"details", "summary"} <= reader.tags <= ALLOWED
    for part in ("layers", "attn", "weight", "2 tensors", "[8, 8]", "metadata (1)", "pt"):
        assert part in reader.text


def hostile() -> tonnage.Checkpoint:
    rows = {name: ("U8", [1], b"x") for name in HOSTILE}
    metadata = {name: name for name in HOSTILE}
    return tonnage.open([content(rows, __metadata__=metadata)])


def test_hostile_names_are_shown_and_do_nothing_in_html() -> None:
    html = hostile()._repr_html_()
    reader = read(html)
    assert reader.tags <= ALLOWED
    assert reader.attributes <= {"style"}
    assert "<script>alert(1)" in reader.text
    assert "&lt;already&gt;" in reader.text
    assert not set(html) & set("\x1b\u202e\0\r\n\x07")
    dtype = tonnage.open(content({"w": ("<img src=x onerror=alert(1)>", [1], b"x")}))
    assert read(dtype._repr_html_()).tags <= ALLOWED


def test_hostile_names_do_nothing_to_a_terminal() -> None:
    checkpoint = hostile()
    shown = repr(checkpoint) + "".join(repr(ref) for ref in checkpoint.values())
    assert not set(shown) & set("\x1b\u202e\0\r\x07")
    assert "\\x1b[2J" in shown
    assert "\\u{202e}gnp.exe" in shown
    assert len(repr(checkpoint).splitlines()) <= 24


def test_a_file_name_may_be_hostile_as_well(tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=alert(1)>\x1b.safetensors"
    write_model(path)
    checkpoint = tonnage.open(path)
    assert read(checkpoint._repr_html_()).tags <= ALLOWED
    assert "\x1b" not in repr(checkpoint)
    assert checkpoint.label == str(path)


def test_the_empty_checkpoint() -> None:
    checkpoint = tonnage.open(content({}))
    assert "0 tensors" in repr(checkpoint)
    assert "0 tensors" in read(checkpoint._repr_html_()).text


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_536_000_000, "1.54 GB"), (10**18, "1000 PB")],
)
def test_sizes_for_people(nbytes: int, shown: str) -> None:
    from tonnage import _display

    assert _display.size(nbytes) == shown
