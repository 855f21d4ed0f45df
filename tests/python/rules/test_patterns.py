"""Rules by pattern go to the planner as they are."""

from __future__ import annotations

from typing import Any

import pytest
import tonnage
import torch
from catalogs import Ref
from tonnage import _rules


def test_patterns_are_sent_as_they_are() -> None:
    rules = {
        "*.q_proj.weight": tonnage.Shard(0),
        "*.layers.0.*": {"pp": tonnage.Owner(0), "tp": tonnage.Shard(1)},
        "*": tonnage.Replicate(),
    }
    request = _rules.request({}, tonnage.Mesh(pp=2, tp=2), rules, unread="allow")
    assert request["mesh"] == [["pp", 2], ["tp", 2]]
    assert list(request["rules"]) == list(rules)
    assert request["rules"]["*"] == "replicate"
    assert request["rules"]["*.layers.0.*"]["pp"] == {"owner": [0]}
    assert request["unread"] == "allow"


@pytest.mark.parametrize(
    ("what", "rules", "error"),
    [
        (tonnage.Mesh(tp=2), "best", tonnage.UsageError),
        (tonnage.Mesh(tp=2), {"*": 3}, TypeError),
        ({"w": torch.empty(2)}, "auto", tonnage.UsageError),
    ],
)
def test_rules_that_are_none_are_refused(what: Any, rules: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        _rules.request({"w": Ref((2,))}, what, rules)
