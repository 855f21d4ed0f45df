"""The script that wrote the conformance cases. The committed files are the truth; see ../README.md."""
