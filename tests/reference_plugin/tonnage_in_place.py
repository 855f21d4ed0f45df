"""pytest plugin: Tonnage answers to the name `safetensors` before the first test is collected."""

import pytest
import tonnage


def pytest_configure(config: pytest.Config) -> None:
    tonnage.as_safetensors()


def pytest_report_header(config: pytest.Config) -> str:
    import safetensors

    return f"safetensors is {safetensors.safe_open!r} of tonnage {tonnage.__version__}"
