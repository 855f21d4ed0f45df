"""pytest plugin: each test's outcome as one JSON line, written as it happens.

A line is written when a test starts, so that the test which takes the process down is known too.
"""

import json
import os
from typing import Any

import pytest


def record(**line: Any) -> None:
    with open(os.environ["OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    record(test=nodeid, outcome="crashed", why="the process died in this test")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        record(test=report.nodeid, outcome="skipped", why=reason)
    elif report.failed:
        record(test=report.nodeid, outcome="failed", why=str(report.longrepr)[-2000:])
    elif report.when == "call":
        record(test=report.nodeid, outcome="passed", why="")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        record(test=f"{report.nodeid}::", outcome="failed", why=str(report.longrepr)[-2000:])
