"""The conformance cases through the Python package, and the corpus held to itself.

What the corpus promises (`conformance/README.md`) is tested first: frozen files keep their bytes,
verdicts that were published stay, the generator and the table of disagreements are not stale. Then
every case is opened with the public API: the verdict, `code`, `clause`, the tensor's name and all
content must be the manifest's.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import safetensors
import tonnage

Case = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2] / "conformance"
FROZEN = ROOT / "frozen"
CASES: list[Case] = json.loads((ROOT / "manifest.json").read_bytes())["cases"]


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(case, id=case["id"]) for case in CASES if case["kind"] == kind]


def everyday(case: Case) -> Case:
    """The case as a reader judges it that takes null for absent metadata (clause 10.1)."""
    compat = case.get("compat", {})
    return {**case, **compat} if compat.get("quirk") == "METADATA_NULL" else case


def integers(values: list[int | str]) -> list[int]:
    return [int(value) for value in values]


def check_refusal(case: Case, error: BaseException) -> None:
    """The exception carries the manifest's code and clause, and names the tensor it gives."""
    found = (getattr(error, "code", None), getattr(error, "clause", None))
    assert found == (case["code"], case["clause"]), f"{type(error).__name__}: {error}"
    if "tensor" in case:
        assert error.tensor == case["tensor"], str(error)  # type: ignore[attr-defined]


# The corpus itself.


def test_frozen_files_keep_their_bytes() -> None:
    lines = (FROZEN / "SHA256SUMS").read_text().splitlines()
    assert len(lines) >= 40
    for line in lines:
        digest, path = line.split("  ", 1)
        assert hashlib.sha256((FROZEN / path).read_bytes()).hexdigest() == digest, path


def test_every_frozen_file_is_listed() -> None:
    listed = {line.split("  ", 1)[1] for line in (FROZEN / "SHA256SUMS").read_text().splitlines()}
    present = {str(path.relative_to(FROZEN)) for path in FROZEN.rglob("*") if path.is_file()}
    assert present - {"SHA256SUMS", "VERDICTS"} == listed


def test_published_verdicts_stay() -> None:
    """Cases are added, never changed: each line of VERDICTS still holds in the manifest."""
    now = {case["id"]: case for case in CASES}
    lines = (FROZEN / "VERDICTS").read_text().splitlines()
    assert len(lines) == len(now)
    for line in lines:
        name, verdict, code, digest = line.split()
        case = now[name]
        assert (case["verdict"], case.get("code", "-")) == (verdict, code), name
        sidecar = ROOT / case["sidecar"] if "sidecar" in case else None
        assert content_digest(ROOT / case["file"], sidecar) == digest, name


def content_digest(path: Path, sidecar: Path | None) -> str:
    """SHA-256 of a file and its sidecar, or of the names and bytes of a folder's files."""
    digest = hashlib.sha256()
    for file in (path, sidecar):
        if file is not None and file.is_file():
            digest.update(file.read_bytes())
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def test_the_corpus_is_small() -> None:
    files = [path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    size = {path: path.stat().st_size for path in files}
    quantised = sum(size[path] for path in files if path.is_relative_to(ROOT / "quant"))
    assert len(CASES) >= 500
    assert sum(size.values()) - quantised < 1_500_000
    # Checkpoints that other libraries wrote.
    assert quantised < 7_000_000


@pytest.mark.parametrize("script", [["generate.py"], ["run_reference.py", "--check"]])
def test_scripts_and_committed_files_agree(script: list[str]) -> None:
    command = [sys.executable, str(ROOT / script[0]), *script[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_manifest_follows_its_schema() -> None:
    schema = json.loads((ROOT / "manifest.schema.json").read_bytes())
    jsonschema.Draft202012Validator(schema).validate(
        json.loads((ROOT / "manifest.json").read_bytes())
    )


# The cases.


def read_content(path: Path) -> dict[str, Any]:
    """What `safe_open` reports, in the manifest's terms."""
    with tonnage.safe_open(path, framework="numpy") as file:
        tensors = {}
        for name in file.offset_keys():
            meta = file.get_tensor_meta(name)
            tensors[name] = (meta.dtype, list(meta.shape), list(meta.data_offsets))
        return {"tensors": tensors, "metadata": file.metadata()}


def expected_content(expect: Case) -> dict[str, Any]:
    tensors = {
        row["name"]: (row["dtype"], integers(row["shape"]), integers(row["data_offsets"]))
        for row in expect["tensors"]
    }
    return {"tensors": tensors, "metadata": expect["metadata"]}


@pytest.mark.parametrize("case", of_kind("header"))
def test_header_through_safe_open(case: Case) -> None:
    case = everyday(case)
    path = ROOT / case["file"]
    if case["verdict"] == "reject" and "limits" not in case:
        with pytest.raises(tonnage.SafetensorError) as caught:
            tonnage.safe_open(path, framework="numpy")
        check_refusal(case, caught.value)
        return
    assert read_content(path) == expected_content(case["expect"])
    if case["verdict"] == "unsupported":
        with tonnage.safe_open(path, framework="numpy") as file:
            with pytest.raises(tonnage.SafetensorError) as caught:
                file.get_tensor(case["tensor"])
        check_refusal(case, caught.value)


@pytest.mark.parametrize("case", of_kind("header"))
def test_header_through_open(case: Case) -> None:
    case = everyday(case)
    path = ROOT / case["file"]
    if case["verdict"] == "reject" and "limits" not in case:
        for source in (path, path.read_bytes()):
            with pytest.raises(tonnage.SafetensorError) as caught:
                tonnage.open(source)
            check_refusal(case, caught.value)
        return
    expect = expected_content(case["expect"])
    with tonnage.open(path) as checkpoint:
        found = {name: (ref.dtype, list(ref.shape), ref.nbytes) for name, ref in checkpoint.items()}
        assert found == {
            name: (dtype, shape, end - begin)
            for name, (dtype, shape, (begin, end)) in expect["tensors"].items()
        }
        assert dict(checkpoint.metadata) == (expect["metadata"] or {})
        if case["verdict"] == "unsupported":
            with pytest.raises(tonnage.SafetensorError) as caught:
                checkpoint[case["tensor"]].numpy()
            check_refusal(case, caught.value)


@pytest.mark.parametrize("case", of_kind("index"))
def test_index_through_open(case: Case) -> None:
    """An index on its own: a good one is accepted as far as its first file, which is not there."""
    path = ROOT / case["file"]
    if case["verdict"] == "accept" and not case["expect"]["files"]:
        assert len(tonnage.open(path)) == 0
        return
    with pytest.raises(tonnage.SafetensorError) as caught:
        tonnage.open(path)
    if case["verdict"] == "accept" or "limits" in case:
        missing = {"code": "INDEX_FILE_MISSING", "clause": "8.8"}
        check_refusal(missing, caught.value)
        assert any(file in str(caught.value) for file in case["expect"]["files"])
    else:
        check_refusal(case, caught.value)


@pytest.mark.parametrize("case", of_kind("directory"))
def test_directory_through_open(case: Case, tmp_path: Path) -> None:
    folder = ROOT / case["file"]
    if "links" in case:
        shutil.copytree(folder.parent, tmp_path / "directory")
        folder = tmp_path / "directory" / folder.name
        for link in case["links"]:
            (folder / link["path"]).symlink_to(link["target"])
    if case["verdict"] == "reject":
        with pytest.raises(tonnage.SafetensorError) as caught:
            tonnage.open(folder)
        check_refusal(case, caught.value)
        return
    with tonnage.open(folder) as checkpoint:
        found = {name: (ref.dtype, list(ref.shape), ref.nbytes) for name, ref in checkpoint.items()}
        rows = {row["name"]: row for row in case["expect"]["tensors"]}
        assert found == {
            name: (row["dtype"], row["shape"], row["data_offsets"][1] - row["data_offsets"][0])
            for name, row in rows.items()
        }
        for name, ref in checkpoint.items():
            assert Path(ref.file).name == Path(rows[name]["file"]).name


@pytest.mark.parametrize("case", of_kind("checksums"))
def test_checksums_through_verify(case: Case) -> None:
    """Verifying says what the manifest says; opening and reading is no error, whatever it says."""
    path = ROOT / case["file"]
    assert read_content(path) == expected_content(case["expect"])
    with tonnage.open(path) as checkpoint:
        assert set(checkpoint.load()) == set(checkpoint)
    found = tonnage.verify(path)
    assert found.ok == (case["verdict"] == "accept")
    assert found.files[0].hashed == ("sidecar" in case and found.ok)
    if found.ok:
        return
    [error] = found.errors
    assert (error.code, error.clause) == (case["code"], case["clause"])
    assert error.file is not None
    if "tensor" in case:
        assert error.tensor == case["tensor"]
    if "chunk" in case:
        begin, size = integers([case["chunk"]["offset"], case["chunk"]["bytes"]])
        assert f"(bytes {begin} to {begin + size})" in error.text


@pytest.mark.parametrize("case", of_kind("checksums"))
def test_checksums_through_a_load(case: Case) -> None:
    """A load compares chunks, and takes no file for verified that has nothing to compare with."""
    with tonnage.open(ROOT / case["file"]) as checkpoint:
        checked = tonnage.verify(ROOT / case["file"]).files[0].chunks > 0
        if not checkpoint.nbytes and case["verdict"] == "accept":
            return
        if case["verdict"] == "accept" or "sidecar" in case:
            if checked:
                checkpoint.load(verify=True)
                return
            case = {"code": "NO_CHECKSUMS", "clause": "13.8"}
        with pytest.raises(tonnage.TonnageError) as caught:
            checkpoint.load(verify=True)
        check_refusal(case, caught.value)


# The frozen files: bytes of writers, and values one by one.

#: What `TensorSpec` calls the dtypes; it has no word for F6.
SPEC_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
PLAIN = {"order": "canonical", "align": 8, "reserve": 0}
JOBS: list[Case] = [
    job
    for job in json.loads((FROZEN / "writer.json").read_bytes())
    if job["options"] == PLAIN and all(row["dtype"] in SPEC_NAMES for row in job["tensors"])
]


def serialized(package: Any, job: Case) -> bytes:
    """The job's file as a package with the reference's `serialize` and `TensorSpec` writes it."""
    specs, keep = {}, []
    for row in job["tensors"]:
        data = np.frombuffer(bytes.fromhex(row["data"]) or b"\0", np.uint8)
        keep.append(data)
        shape = list(row["shape"])
        if row["dtype"] == "F4":
            shape[-1] //= 2  # the API counts pairs
        specs[row["name"]] = package.TensorSpec(
            dtype=SPEC_NAMES[row["dtype"]],
            shape=shape,
            data_ptr=data.ctypes.data,
            data_len=len(row["data"]) // 2,
        )
    return bytes(package.serialize(specs, job["metadata"]))


@pytest.mark.parametrize("job", [pytest.param(job, id=job["id"]) for job in JOBS])
def test_writer_gives_the_frozen_bytes(job: Case) -> None:
    assert serialized(tonnage, job) == (FROZEN / job["file"]).read_bytes()


@pytest.mark.parametrize("job", [pytest.param(job, id=job["id"]) for job in JOBS])
def test_frozen_bytes_are_the_references(job: Case) -> None:
    """With more than one metadata entry its order is random, and empty metadata breaks its file."""
    written, frozen = serialized(safetensors, job), (FROZEN / job["file"]).read_bytes()
    count = len(job["metadata"] or {})
    if count > 1:
        assert sorted(written) == sorted(frozen)
    else:
        assert (written == frozen) == (job["metadata"] != {})


def element(dtype: str, text: str) -> Any:
    if dtype == "BOOL":
        return text == "True"
    if dtype == "C64":
        return complex(*map(float, text.split()))
    return int(text) if dtype[0] in "IU" else float(text)


DTYPES: dict[str, Case] = json.loads((FROZEN / "dtypes.json").read_bytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_values(dtype: str) -> None:
    """Every element of every dtype is what the table says: packing, bit order and byte order."""
    row = DTYPES[dtype]
    with tonnage.open(FROZEN / row["file"]) as checkpoint:
        array = checkpoint[row["tensor"]].numpy()
    wanted = [element(dtype, text) for text in row["values"]]
    assert array.size == len(wanted)
    if dtype[0] in "IU" or dtype == "BOOL":
        assert array.ravel().tolist() == wanted
        return
    wide = np.complex128 if dtype == "C64" else np.float64
    found, wanted = array.ravel().astype(wide), np.array(wanted, wide)
    np.testing.assert_array_equal(found, wanted)
    if dtype != "C64":
        known = ~np.isnan(wanted)
        assert (np.signbit(found) == np.signbit(wanted))[known].all()


def test_frozen_sharded_checkpoint() -> None:
    with tonnage.open(FROZEN / "sharded") as checkpoint:
        assert len(checkpoint) == 6
        assert checkpoint["model.layers.1.up.weight"].shape == (4, 8)
        assert checkpoint["model.empty"].shape == (0, 3)
        total = sum(ref.nbytes for ref in checkpoint.values())
    index = json.loads((FROZEN / "sharded/model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == total
