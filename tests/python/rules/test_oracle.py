"""Every rank's tensors are those of PyTorch's own sharding of the model that one process loads.

Four gloo processes hold the rules to `distribute_tensor(parameter, mesh,
placements).to_local()`, bit for bit, with the placements that transformers gives the parameters of
the model in that process group. What transformers itself loads there is no oracle: it shards a
fused tensor before it splits it, and so gives `hrm_text` wrong rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import tonnage
from tonnage._rules import hf

RANKS = 4


@pytest.fixture(scope="session")
def reports(folder: Path) -> list[dict[str, Any]]:
    """What each rank found, for all cases."""
    worker = Path(__file__).with_name("worker.py")
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(worker), str(folder)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize(("model", "layout"), models.MEANT)
def test_every_rank_has_what_pytorch_gives_it(
    reports: list[dict[str, Any]], model: str, layout: str
) -> None:
    case = f"{model}-{layout}"
    found = {rank: report[case] for rank, report in enumerate(reports) if case in report}
    assert len(found) == models.LAYOUTS[layout].mesh.size
    for rank, one in found.items():
        assert one["tensors"] > 0, f"rank {rank} has nothing to compare"
        assert one["wrong"] == [], f"rank {rank}"
        # A model of DTensors, where there is no pipeline to cut it, says the same itself.
        assert one.get("from_dtensors", []) == [], f"rank {rank}"


def test_a_state_dict_of_dtensors_says_where_its_tensors_are(reports: list[dict[str, Any]]) -> None:
    for rank, report in enumerate(reports):
        assert report["placements"]["wrong"] == [], f"rank {rank}"


@pytest.mark.parametrize(("model", "layout"), list(models.MEANINGLESS))
def test_what_means_nothing_is_refused(folder: Path, model: str, layout: str) -> None:
    with pytest.raises(tonnage.UsageError) as refused:
        hf.request(tonnage.open(folder / model), models.LAYOUTS[layout].mesh)
    assert refused.value.code == "NO_PLAN"
    assert "rules={pattern" in str(refused.value)
