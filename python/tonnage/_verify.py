"""`tonnage.verify`: everything that is wrong with a checkpoint, not the first thing only."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tonnage import _display
from tonnage._native import _verify


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: `"error"` (no strict reader accepts it), `"warning"` or `"note"`.
        code: stable name, such as `"HOLE"`.
        clause: clause of the specification, or `None`.
        file: the file concerned, or `None` for the checkpoint as a whole.
        tensor: the tensor concerned, or `None`.
        text: what was found and what was needed.
    """

    severity: str
    code: str
    clause: str | None
    file: str | None
    tensor: str | None
    text: str

    def __str__(self) -> str:
        clause = f" (clause {self.clause})" if self.clause else ""
        file = f"{_display.plain(self.file)}: " if self.file else ""
        return f"{self.severity}: {file}{self.code}: {_display.plain(self.text)}{clause}"


@dataclass(frozen=True)
class VerifiedFile:
    """A file that was looked at: how many tensors and bytes it holds, and whether its header was
    sound.

    Attributes:
        chunks: how many chunks of data were compared with their checksums; 0 where there are none.
        hashed: whether all of it was compared with the BLAKE3 hash beside it.
    """

    label: str
    tensors: int
    nbytes: int
    readable: bool
    chunks: int = 0
    hashed: bool = False


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found. True in a condition where nothing is wrong.

    Attributes:
        files: the files that were looked at.
        findings: what was found, errors first within each file.
    """

    files: tuple[VerifiedFile, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error. Warnings and notes are allowed."""
        return all(finding.severity != "error" for finding in self.findings)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        tensors = sum(file.tensors for file in self.files)
        nbytes = sum(file.nbytes for file in self.files)
        head = (
            f"{'ok' if self.ok else 'NOT OK'}: {len(self.files)} files, {tensors} tensors, "
            f"{_display.size(nbytes)}"
        )
        return "\n".join([head, *(str(finding) for finding in self.findings)])


def verify(
    path: str | os.PathLike[str], *, allow_symlinks: bool = False, headers_only: bool = False
) -> Verification:
    """Checks a file, a folder or an index file against the whole format, every file of it.

    Data is compared with the checksums that a file has, if it has some; `headers_only=True` leaves
    that out and reads no data. A chunk that is wrong is a finding with the tensors that lie in it.

    What is wrong is in the result and raises nothing. Raises `OSError` only where there is nothing
    to look
    at: no such path, no permission.
    """
    files, findings = _verify(os.fsdecode(path), allow_symlinks, headers_only)
    return Verification(
        tuple(VerifiedFile(*row) for row in files), tuple(Finding(*row) for row in findings)
    )
