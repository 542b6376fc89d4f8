"""K micro-batches on N ranks under any engine equal one big batch: DESIGN section 7's figures, on real engines.

One launch per row of exact_table.LAUNCHES runs every case of tests/programs/exactness.py. The update of an SGD step is
the clipped gradient itself (times the learning rate), read off the weights; float32 limits how exactly a difference of
weights can be read, which is what its tolerance is for. Where the tolerances stand, their reasons stand too:
tests/support/exact_table.py."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from tests.support.exact_table import AGAINST_FLOAT32, AGAINST_THE_ENGINE, KINDS, KS, LAUNCHES, Launch
from tests.support.forked import accelerate
from tests.support.launch import launch_file, program
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow

RANDOM_WINDOWS = 1  # of each kind of training in each launch


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda launch: launch.name)
def launched(request, recipe, tmp_path_factory) -> tuple[Launch, dict]:
    folder, launch = tmp_path_factory.mktemp("engine"), request.param
    config = launch_file(folder / "launch.yaml", **launch.layout)
    seed = zlib.crc32(launch.name.encode())  # rows and windows differ from launch to launch, and never from run to run
    arguments = (folder / "out.json", str(seed), str(RANDOM_WINDOWS))
    result = accelerate(config, *program("exactness"), recipe, *arguments, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((folder / "out.json").read_text())
    print(f"{launch.name}: seed {seed}")
    assert found["ranks"] == launch.ranks
    assert found["engine"] == ("deepspeed" if launch.engine != "DDP" else "ddp" if launch.ranks > 1 else "single")
    return launch, found


def of(found: dict, **wanted) -> list[dict]:
    """The cases with these values."""
    return [case for case in found["cases"] if all(case[name] == value for name, value in wanted.items())]


def gradient_error(case: dict) -> float:
    """The worst of all windows, each from the same weights: relative L2 of the update, and of the norm before
    clipping.
    """
    return max(max(w["update_difference"], abs(w["norm_ratio"] - 1)) for w in case["windows"])


def kinds(launch: Launch) -> set[str]:
    return set(KINDS) - ({"QLoRA"} if launch.engine.startswith("ZeRO-3") else set())


def test_accumulated_gradient_and_weights_equal_one_batch(launched):
    launch, found = launched
    limit = AGAINST_FLOAT32[launch.precision]
    assert {case["kind"] for case in found["cases"]} == kinds(launch)
    for kind in kinds(launch):
        (sgd,) = of(found, name=f"{kind}, SGD")
        if launch.precision == "no":
            assert sgd["start_difference"] == 0.0  # the same weights on both sides, bit for bit
        assert {w["K"] for w in sgd["windows"]} >= set(KS)
        assert [w["K"] for w in sgd["windows"]][:6] == [17, 8, 3, 8, 1, 1]
        assert all(w["applied"] for w in sgd["windows"])
        assert gradient_error(sgd) <= limit, (launch, found["seed"], sgd)
        adamw = [case for name in ("AdamW", "AdamW, packed") for case in of(found, name=f"{kind}, {name}")]
        assert sgd["packed"] and [case["packed"] for case in adamw] == [False, True]
        for case in (sgd, *adamw):
            assert case["weight_difference"] <= limit, (launch, found["seed"], case)


def test_accumulated_gradient_equals_one_batch_of_the_same_engine(launched):
    launch, found = launched
    for kind in kinds(launch):
        (case,) = of(found, name=f"{kind}, SGD")
        assert case["from_yardstick"] <= AGAINST_THE_ENGINE[launch.precision], (launch, found["seed"], case)


def test_a_broken_scale_is_seen(launched):
    launch, found = launched
    broken = [case for case in found["cases"] if case["broken"]]
    if launch.precision == "no":
        assert {case["broken"] for case in broken} == {"mean of means", "K"} | (
            {"world"} if launch.ranks > 1 else set()
        )
    for case in broken:
        assert gradient_error(case) > 2 * AGAINST_FLOAT32["bf16"], (found["seed"], case)


def test_a_float32_buffer_keeps_what_a_bf16_buffer_loses(launched):
    launch, found = launched
    if launch.precision == "no" or launch.engine == "DDP":
        assert not of(found, buffer="bf16")
        return
    (ours, low), (repeated, repeated_low) = (
        [of(found, name=f"{rows}, {buffer} buffer")[0] for buffer in ("our", "bf16")] for rows in ("random", "repeated")
    )
    # 64 times the same bf16 gradient is exact in float32's 24 bits, and more than bf16's 8 can add up
    assert repeated["from_yardstick"] <= 1e-6, (launch, repeated)
    assert repeated_low["from_yardstick"] > 2.0**-8, (launch, repeated_low)
    # of random rows, both carry the rounding of every micro-batch's own gradient
    assert ours["from_yardstick"] <= AGAINST_THE_ENGINE["bf16"]
    assert low["from_yardstick"] > 1.5 * ours["from_yardstick"], (launch, ours, low)
    assert gradient_error(low) > 1.5 * gradient_error(ours), (launch, ours, low)


def test_ddp_reduces_once_per_window_whatever_its_micro_batches(launched):
    launch, found = launched
    if launch.ranks == 1 or launch.precision != "no":
        assert not found["communication"]
        return
    counted = {row["K"]: row["collectives"] for row in found["communication"]}
    parameters = found["communication"][0]["parameters"]
    assert set(counted) == {1, 3, 8}
    for k, collectives in counted.items():
        times = {"DDP": 1, "ZeRO-1": 1}.get(launch.engine, k)
        assert gradients_reduced(collectives) == times * parameters, (launch, k, collectives)


def gradients_reduced(collectives: dict) -> int:
    """Elements of gradients that were reduced over the ranks, padding included."""
    return sum(row["elements"] for name, row in collectives.items() if "reduce" in name)
