"""Plans of `prefetch` as requests: parts along every dimension."""

from __future__ import annotations

from typing import Any

import loading
import numpy as np
import pytest
import tonnage
from catalogs import Ref, catalog_of, random
from tonnage._rules import prefetch


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, lambda w: w),
        (slice(2, 5), lambda w: w[2:5]),
        (slice(-3, None), lambda w: w[-3:]),
        ([slice(0, 2), slice(5, 7)], lambda w: np.concatenate([w[0:2], w[5:7]])),
        ([3, 0, slice(0, 2)], lambda w: w[[3, 0, 0, 1]]),
        ((slice(None), slice(1, 6, 2)), lambda w: w[:, 1:6:2]),
        ((slice(1, 3), [slice(0, 1), slice(3, 5)]), lambda w: w[1:3][:, [0, 3, 4]]),
        (([0, 4], [slice(2, 4), 0]), lambda w: w[[0, 4]][:, [2, 3, 0]]),
        ((slice(None), 2), lambda w: w[:, 2]),
        ((3, slice(1, 4), 0), lambda w: w[3, 1:4, 0]),
        ((slice(4, 4),), lambda w: w[4:4]),
    ],
)
def test_parts_of_tensors(value: Any, wanted: Any) -> None:
    arrays = random(w=(7, 6, 2))
    request = prefetch.request(catalog_of(arrays), {"w": value})
    found = loading.load(request, arrays, 0)["w"]
    assert found.shape == wanted(arrays["w"]).shape
    assert np.array_equal(found, wanted(arrays["w"]))


def test_without_a_plan_everything_is_wanted() -> None:
    arrays = random(a=(2,), b=())
    request = prefetch.request(catalog_of(arrays))
    assert loading.load(request, arrays, 0).keys() == arrays.keys()


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"w": slice(0, 4, 2)}, "step 1"),
        ({"w": slice(0, 9)}, "out of range"),
        ({"w": (slice(None),) * 4}, "4 dimensions"),
        ({"w": {0}}, "must be None or a slice"),
        ({"v": None}, "no tensor v"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: dict[str, Any], says: str) -> None:
    with pytest.raises(tonnage.SafetensorError, match=says):
        prefetch.request({"w": Ref((7, 6, 2))}, plan)
