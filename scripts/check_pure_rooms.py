"""Prove that the pure rooms' disallowed lists bite.

A list that names a path wrongly, or that clippy never reads, forbids nothing and says nothing. So
for each pure room this writes a crate with the room's clippy.toml beside its manifest, as in the
room, and one use of every path on the lists, and requires clippy to refuse each of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
#: Rooms that must have a list, as soon as they exist.
PURE = ("format", "quant", "plan")
#: Paths that every list must hold at least.
CORE = {
    "std::fs::File",
    "std::fs::read",
    "std::env::var",
    "std::thread::spawn",
    "std::time::Instant",
}
LINTS = {"clippy::disallowed_types", "clippy::disallowed_methods", "clippy::disallowed_macros"}
#: Arguments for the functions that take some.
ARGUMENTS = {
    "std::env::var": '"A"',
    "std::env::var_os": '"A"',
    "std::fs::canonicalize": '"a"',
    "std::fs::copy": '"a", "b"',
    "std::fs::create_dir": '"a"',
    "std::fs::create_dir_all": '"a"',
    "std::fs::metadata": '"a"',
    "std::fs::read": '"a"',
    "std::fs::read_dir": '"a"',
    "std::fs::read_to_string": '"a"',
    "std::fs::remove_file": '"a"',
    "std::fs::rename": '"a", "b"',
    "std::fs::symlink_metadata": '"a"',
    "std::fs::write": '"a", "b"',
    "std::process::exit": "0",
    "std::thread::scope": "|_| ()",
    "std::thread::sleep": "core::time::Duration::ZERO",
    "std::thread::spawn": "|| ()",
}
MANIFEST = '[package]\nname = "bites"\nversion = "0.0.0"\nedition = "2024"\n[workspace]\n'


def paths(config: dict[str, list[dict[str, str]]], kind: str) -> list[str]:
    return [entry["path"] for entry in config.get(f"disallowed-{kind}", [])]


def use_everything(config: dict[str, list[dict[str, str]]]) -> str:
    """A crate that uses each listed path once: a type in an alias, a call, a macro."""
    lines = ["#![allow(unused, unreachable_code)]"]
    for number, path in enumerate(paths(config, "types")):
        lines.append(f"pub type T{number} = {path}{'<()>' if path.endswith('JoinHandle') else ''};")
    for number, path in enumerate(paths(config, "methods")):
        lines.append(f"pub fn f{number}() {{ let _ = {path}({ARGUMENTS.get(path, '')}); }}")
    for number, path in enumerate(paths(config, "macros")):
        lines.append(f'pub fn m{number}() {{ {path}!("x") }}')
    return "\n".join(lines) + "\n"


def refused(crate: Path) -> set[str]:
    """The paths that clippy refused in `crate`."""
    command = ["cargo", "clippy", "--quiet", "--message-format=json", "--manifest-path"]
    environment = {**os.environ, "CARGO_TARGET_DIR": str(TARGET / "pure-rooms" / "target")}
    environment.pop("CLIPPY_CONF_DIR", None)
    result = subprocess.run(
        [*command, str(crate / "Cargo.toml")], capture_output=True, text=True, env=environment
    )
    found = set()
    for line in result.stdout.splitlines():
        message = json.loads(line).get("message") or {}
        if (message.get("code") or {}).get("code") in LINTS:
            found.add(message["message"].split("`")[1])
    if not found:
        print(result.stderr, file=sys.stderr)
    return found


def check(room: str) -> list[str]:
    source = ROOT / "crates" / room / "clippy.toml"
    if not source.is_file():
        return [f"{room}: a pure room needs its own clippy.toml"]
    config = tomllib.loads(source.read_text(encoding="utf-8"))
    listed = {path for kind in ("types", "methods", "macros") for path in paths(config, kind)}
    crate = TARGET / "pure-rooms" / room
    (crate / "src").mkdir(parents=True, exist_ok=True)
    (crate / "Cargo.toml").write_text(MANIFEST)
    (crate / "clippy.toml").write_bytes(source.read_bytes())
    (crate / "src" / "lib.rs").write_text(use_everything(config))
    found = refused(crate)
    print(f"{room}: clippy refuses {len(listed & found)} of the {len(listed)} listed paths")
    return [f"{room}: the list lacks {path}" for path in sorted(CORE - listed)] + [
        f"{room}: listed, but clippy lets it pass: {path}" for path in sorted(listed - found)
    ]


def main() -> int:
    rooms = [room for room in PURE if (ROOT / "crates" / room).is_dir()]
    wrong = [line for room in rooms for line in check(room)]
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong) or not rooms)


if __name__ == "__main__":
    sys.exit(main())
