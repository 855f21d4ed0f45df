"""Run PyTorch's own tests of its Hugging Face storage classes, on those and on Tonnage's.

PyTorch's wheel has no tests: they come from a checkout of its sources, which nothing of is kept
here. Each test file is copied beside a module that is imported before anything of it and that

- puts `tonnage.torch.dcp.HuggingFaceStorageWriter` and `HuggingFaceStorageReader` in the place of
  PyTorch's (in the second run; the first one is PyTorch's own, and shows what a test is worth),
- lets tests that ask for several GPUs run on as many processes under gloo.

The rule: what passes with PyTorch's classes passes with Tonnage's, but for the tests named below,
which look at the inside of PyTorch's classes and not at what they do. Those are run as well: one
that passes must not be in the list. Exit status 1 where the rule does not hold.

    python scripts/torch_dcp_tests.py PATH_TO_TORCH_CHECKOUT [-v]

PyTorch's test helpers need the package `expecttest`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

FOLDER = Path("test/distributed/checkpoint")
FILES = ["test_hf_safetensor_e2e.py", "test_hf_storage.py"]
#: Longest that one file's tests may take before they count as hung.
TIMEOUT_S = 900

MADE_UP = "calls a writer's steps by themselves, with a plan made for the inside of PyTorch's"
MOCKED = "puts a mock in the place of safetensors and asserts which of its functions are called"
#: test → why it says nothing about another implementation.
NOT_APPLICABLE = {
    "TestHfStorage.test_write_data_hf": MADE_UP,
    "TestHfStorage.test_write_data_with_sharding": MADE_UP,
    "TestHfStorage.test_write_metadata_hf": MADE_UP,
    "TestHfStorage.test_read_data_hf": MOCKED,
    "TestHfStorage.test_read_metadata_hf": MOCKED,
    "TestSingleRankSaveLoad.test_quantized_checkpoint_loading": (
        "is of QuantizedHuggingFaceStorageReader, PyTorch's own subclass, which is not replaced"
    ),
}

#: Imported by each copy, in every process.
SUBSTITUTE = '''
import os

import torch
import torch.distributed.checkpoint as checkpoint
from torch.testing._internal.distributed._tensor import common_dtensor

common_dtensor.skip_if_lt_x_gpu = lambda *args, **kwargs: lambda test: test
torch.Tensor.cuda = lambda self, *args, **kwargs: self

if os.environ["TONNAGE_SUBSTITUTES"] == "1":
    # A test says `import safetensors` and uses `safetensors.torch`, which PyTorch's writer imports.
    import safetensors.torch
    from torch.distributed.checkpoint import hf_storage
    from tonnage.torch import dcp

    class Writer(dcp.HuggingFaceStorageWriter):
        """Older tests say `save_sharded`."""

        def __init__(self, *args, save_sharded=None, **kwargs):
            if save_sharded is not None:
                kwargs["save_distributed"] = save_sharded
            super().__init__(*args, **kwargs)

    for module in (checkpoint, hf_storage):
        module.HuggingFaceStorageWriter = Writer
        module.HuggingFaceStorageReader = dcp.HuggingFaceStorageReader
    checkpoint._HuggingFaceStorageWriter = Writer
    checkpoint._HuggingFaceStorageReader = dcp.HuggingFaceStorageReader
'''


def run(file: Path, ours: bool) -> dict[str, str]:
    """Of each test of a file what came of it: nothing, or what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "_substitute.py").write_text(SUBSTITUTE, encoding="utf-8")
        copy = folder / file.name
        copy.write_text("import _substitute\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
        environment = {
            **os.environ,
            "TONNAGE_SUBSTITUTES": str(int(ours)),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([name, os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += [f"--rootdir={name}", f"--junit-xml={folder / 'out.xml'}", str(copy)]
        done = subprocess.run(
            command, cwd=name, env=environment, timeout=TIMEOUT_S, capture_output=True, text=True
        )
        if not (folder / "out.xml").is_file():
            sys.exit(f"{file.name}: no test ran\n{done.stdout}{done.stderr}")
        return outcomes(folder / "out.xml")


def outcomes(report: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    # It was written by our own process.
    for case in xml.parse(report).iter("testcase"):
        test = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        wrong = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        if wrong is None:
            found[test] = ""
        else:
            text = (wrong.get("message") or "").strip() + " " + (wrong.text or "").strip()
            found[test] = f"{wrong.tag}: {text or 'no reason'}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of PyTorch's sources")
    parser.add_argument("-v", action="store_true", help="all of what a failing test said")
    arguments = parser.parse_args()
    counts = {"passed": 0, "not applicable": 0, "no base": 0, "failed": 0}
    for name in FILES:
        file = arguments.checkout / FOLDER / name
        if not file.is_file():
            sys.exit(f"{file}: there is no such file; PyTorch 2.8 and newer have it")
        theirs, ours = run(file, False), run(file, True)
        for test, base in theirs.items():
            found = ours.get(test, "error: it did not run")
            reason = NOT_APPLICABLE.get(test)
            if base:
                kind, why = "no base", f"PyTorch's own classes: {base}"
            elif reason and (found or "not replaced" in reason):
                kind, why = "not applicable", reason
            elif reason:
                kind, why = "failed", "it is named as not applicable, and passes"
            else:
                kind, why = ("failed", found) if found else ("passed", "")
            counts[kind] += 1
            short = (why.splitlines() or [""])[0]
            print(f"{kind:15}{test}{': ' if why else ''}{why if arguments.v else short}")
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return int(bool(counts["failed"]) or not counts["passed"])


if __name__ == "__main__":
    sys.exit(main())
