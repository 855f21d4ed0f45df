"""`python -m bench quant`: ggml's blocks to floats on one core, beside ggml's own code.

Sides take turns, medians are compared. *Tonnage* is `examples/dequantize_speed.rs`, a process that
answers how long a measurement took. *libgguf* is ggml's code as the wheel of that name compiles it
(`pip install libgguf`), called through ctypes; *ggml* is its C built here as it ships, `-O3`
without `-march`, where the variable GGML names a checkout. *cache*: 32,768 elements, so blocks and
values stay in the second cache. *memory*: 33,554,432 elements, 128 MiB of values. The limits are
plain and non-temporal stores of AVX2, and C's memset, to the same amount of memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from .measure import ROOT

#: Name, elements and bytes of a block.
TYPES = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_XS": (256, 136),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}
#: Elements, calls a measurement, measurements a round.
PLACES = {"cache": (1 << 15, 40, 5), "memory": (1 << 25, 1, 1)}
SIDES = ("Tonnage", "libgguf", "ggml")

LIMITS = """
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
void plain(float * p, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) _mm256_store_ps(p + i, _mm256_set1_ps(1.0f));
}
void streamed(float * p, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) _mm256_stream_ps(p + i, _mm256_set1_ps(1.0f));
    _mm_sfence();
}
"""

#: What ggml's file wants of the rest of ggml, and never calls here.
SHIM = """
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
void ggml_abort(const char * f, int l, const char * s, ...) { abort(); }
size_t ggml_row_size(int t, int64_t n) { abort(); }
size_t ggml_type_size(int t) { abort(); }
const char * ggml_type_name(int t) { return ""; }
"""

Call = Callable[[int, int, int], None]


def build(folder: Path, name: str, text: str, *arguments: str) -> ctypes.CDLL:
    source, library = folder / f"{name}.c", folder / f"{name}.so"
    source.write_text(text)
    command = ["gcc", "-fPIC", "-shared", "-DNDEBUG", str(source), *arguments, "-lm"]
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def ggml(folder: Path) -> ctypes.CDLL | None:
    checkout = os.environ.get("GGML")
    if checkout is None:
        return None
    source = Path(checkout) / "src"
    includes = [f"-I{Path(checkout) / 'include'}", f"-I{source}", f"-I{source / 'ggml-cpu'}"]
    return build(folder, "ggml", SHIM, "-O3", *includes, str(source / "ggml-quants.c"))


def libgguf() -> ctypes.CDLL:
    files = distribution("libgguf").files or []
    library = next(file for file in files if file.name.startswith("_libgguf"))
    # Its references to Python's own functions are found when they are called, which is never.
    return ctypes.CDLL(str(library.locate()), mode=ctypes.DEFAULT_MODE | os.RTLD_LAZY)


def mangled(name: str) -> str:
    lower = name.lower()
    function, block = f"dequantize_block_{lower}", f"block_{lower.replace('_k', '_K')}"
    return f"_Z{len(function)}{function}PK{len(block)}{block}Pfl"


def caller(library: ctypes.CDLL, symbol: str) -> Call:
    function = library[symbol]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


def timed(times: int, call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


class Program:
    """The Rust side, in a process of its own."""

    def __init__(self) -> None:
        cargo = ["cargo", "build", "--quiet", "--release", "-p", "tonnage-quant"]
        subprocess.run([*cargo, "--example", "dequantize_speed"], cwd=ROOT, check=True)
        target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
        self.process = subprocess.Popen(
            [target / "release/examples/dequantize_speed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(question, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def run(folder: Path, rounds: int, _size: int, limit: float) -> dict[str, Any]:
    os.setpriority(os.PRIO_PROCESS, 0, min(os.getpriority(os.PRIO_PROCESS, 0), -20))
    program = Program()
    libraries = {"libgguf": (libgguf(), mangled), "ggml": (ggml(folder), row_function)}
    limits = build(folder, "limits", LIMITS, "-O2", "-mavx2")
    elements = max(place[0] for place in PLACES.values())
    blocks, values = mmap.mmap(-1, elements * 2), mmap.mmap(-1, elements * 4)
    blocks.write(bytes(60 + byte % 60 for byte in os.urandom(1 << 16)) * (elements * 2 >> 16))
    source, target = address(blocks), address(values)
    memset = ctypes.CDLL(None).memset
    memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    fills: dict[str, Callable[[int], object]] = {
        "plain stores": lambda n: limits.plain(ctypes.c_void_p(target), ctypes.c_int64(n)),
        "non-temporal stores": lambda n: limits.streamed(
            ctypes.c_void_p(target), ctypes.c_int64(n)
        ),
        "memset": lambda n: memset(target, 0, 4 * n),
    }
    samples: dict[str, list[float]] = {}
    deadline = time.monotonic() + limit

    def add(place: str, name: str, side: str, seconds: float, count: int) -> None:
        samples.setdefault(f"{place} {name} {side}", []).append(count / seconds / 1e9)

    for at in range(rounds):
        if at > 0 and time.monotonic() > deadline:
            break
        for place, (count, times, repeats) in PLACES.items():
            for _ in range(repeats):
                for name, fill in fills.items():
                    seconds = timed(times, lambda fill=fill, count=count: fill(count))
                    add(place, "limit", name, seconds, count)
                for name in TYPES:
                    for width in ("f32", "bf16") if at % 2 == 0 else ("f32",):
                        took = program.ask(f"dequantize {name} {width} {count} {times}")
                        side = "Tonnage" if width == "f32" else width
                        add(place, name, side, took, count)
                    for side, (library, symbol) in libraries.items():
                        if library is not None:
                            call = caller(library, symbol(name))
                            took = timed(
                                times,
                                lambda call=call, count=count: call(source, target, count),
                            )
                            add(place, name, side, took, count)
    program.process.kill()
    print(f"\n{table(samples)}\n", flush=True)
    return {"unit": "10^9 elements a second", "samples": samples}


def row_function(name: str) -> str:
    return f"dequantize_row_{name.lower().replace('_k', '_K')}"


def table(samples: dict[str, list[float]]) -> str:
    def median(place: str, name: str, side: str) -> float:
        return statistics.median(samples.get(f"{place} {name} {side}", [float("nan")]))

    sides = [side for side in (*SIDES, "bf16") if f"cache Q4_K {side}" in samples]
    lines = [f"| | {' | '.join(f'{place}: {s}' for place in PLACES for s in sides)} |"]
    lines.append(f"|---|{'---:|' * len(PLACES) * len(sides)}")
    for name in TYPES:
        cells = [f"{median(place, name, side):.2f}" for place in PLACES for side in sides]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for place in PLACES:
        for limit in ("plain stores", "non-temporal stores", "memset"):
            lines.append(f"{place}, {limit}: {median(place, 'limit', limit):.2f}")
    return "\n".join(lines)
