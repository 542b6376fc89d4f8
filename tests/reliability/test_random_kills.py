"""Every process of a real run killed at random moments, up to three times; resumed, it is the unbroken run. The seed is
printed.
"""

from __future__ import annotations

import os
import time

import pytest

from tests.support.random_kills import kill_chain, make_bench

pytestmark = pytest.mark.slow


def test_a_run_killed_at_random_moments_is_bitwise_the_unbroken_one(tmp_path, monkeypatch):
    # put back afterwards
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR", str(tmp_path / "none")))
    seed = int(time.time())  # other moments every time: scripts/benchmarks/reliability.py takes the seed of a failure
    print(f"seed {seed}")
    bench = make_bench(tmp_path, seed)
    found = kill_chain(bench, "DDP on 2 ranks", 0, deadline=time.monotonic() + 300)
    assert found["kills"] or found["came_through"]
    assert (found["lost"], found["differences"], found["orphans"]) == ("", [], 0), found
