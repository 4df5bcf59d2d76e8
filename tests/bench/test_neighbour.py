"""Each kind of greedy guest really is at work while its neighbour is measured."""

from __future__ import annotations

import os

import pytest

from tests.bench.greed import GREEDY, CannotBeHadError, Greed
from tests.bench.neighbour import measure

KINDS = {greed.kind: greed for greed in GREEDY if greed.kind not in ("tmpfs", "cached")}  # disks like "direct"
BUCKET = 65 / 64  # a percentile is the upper end of a bucket of the histogram


@pytest.mark.parametrize("greed", KINDS.values(), ids=KINDS)
def test_a_neighbour_is_measured_alone_and_beside_each_kind_of_greed(greed: Greed) -> None:
    try:
        alone, beside = measure(greed, min(os.sched_getaffinity(0)), rounds=1, seconds=0.02)
    except CannotBeHadError as error:
        pytest.skip(str(error))
    assert 0 < alone.p50 <= alone.p99 <= alone.most * BUCKET
    assert 0 < beside.p50 <= beside.p99 <= beside.most * BUCKET
