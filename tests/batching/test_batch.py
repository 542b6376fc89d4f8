"""global_batch_size = rows per micro-batch x K x ranks: one value derived, the product checked, refusals with
arithmetic.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.batching.plan import BatchPlan, derive_batch
from finetune.errors import UserError

SMALL = st.integers(1, 32)


def where(key: str) -> str:
    return f"recipe.yaml:{len(key)}"


def refused(*arguments) -> str:
    with pytest.raises(UserError) as error:
        derive_batch(*arguments, where)
    assert len(error.value.messages) == 1
    return error.value.messages[0]


@given(SMALL, SMALL, SMALL)
def test_each_of_the_three_is_derived_from_the_others(per_device, steps, ranks):
    plan = BatchPlan(per_device * steps * ranks, per_device, steps, ranks)
    for given_values in (
        (plan.global_batch_rows, per_device, steps),
        ("auto", per_device, steps),
        (plan.global_batch_rows, "auto", steps),
        (plan.global_batch_rows, per_device, "auto"),
    ):
        assert derive_batch(*given_values, ranks) == plan


def test_the_plan_is_one_line():
    assert (
        derive_batch(64, 4, "auto", 2).line()
        == "64 rows per optimizer step = 4 rows per micro-batch x K=8 micro-batches x 2 ranks"
    )
    assert derive_batch(8, "auto", 8, 1).line().endswith("= 1 row per micro-batch x K=8 micro-batches x 1 rank")


def test_what_does_not_divide_is_refused_with_the_arithmetic_and_the_nearest_fixes():
    assert (
        refused(64, 3, "auto", 4)
        == f"{where('training.global_batch_size')}: training.global_batch_size is 64, but 3 rows x 4 ranks = 12"
        " does not"
        " divide it. Use 60 or 72, or per_device_train_batch_size 4."
    )
    assert (
        "is 10, but 4 micro-batches x 1 ranks = 4 does not divide it. Use 8 or 12, or gradient_accumulation_steps 5."
        in (refused(10, "auto", 4, 1))
    )


def test_a_batch_smaller_than_the_ranks_is_refused_without_a_batch_of_zero():
    message = refused(2, 1, "auto", 4)
    assert message.endswith("training.global_batch_size is 2, but 1 rows x 4 ranks = 4 does not divide it. Use 4.")


@given(st.integers(1, 500), SMALL, SMALL)
def test_every_fix_in_a_refusal_works(global_batch, per_device, ranks):
    if global_batch % (per_device * ranks) == 0:
        assert derive_batch(global_batch, per_device, "auto", ranks).global_batch_rows == global_batch
        return
    advice = refused(global_batch, per_device, "auto", ranks).rpartition("Use ")[2]
    batches, _, micro = advice.partition(", or per_device_train_batch_size ")
    for number in re.findall(r"\d+", batches):
        assert derive_batch(int(number), per_device, "auto", ranks).global_batch_rows == int(number)
    if micro:
        assert derive_batch(global_batch, int(micro.rstrip(".")), "auto", ranks).global_batch_rows == global_batch


def test_three_values_that_disagree_are_refused_with_their_product():
    message = refused(64, 4, 4, 2)
    assert (
        "training.global_batch_size is 64, but 4 rows x 4 micro-batches x 2 ranks = 32. Use global_batch_size 32"
        in message
    )
    assert message.startswith(where("training.global_batch_size"))


def test_two_autos_leave_the_micro_batch_to_be_chosen_by_memory():
    batch = derive_batch(64, "auto", "auto", 2)
    assert batch.open and (batch.global_batch_rows, batch.per_device_rows, batch.accumulation_steps) == (64, 1, 32)
    assert "the largest that fit training.device_memory" in batch.line()
    assert "2 ranks = 2 does not divide it" in refused(7, "auto", "auto", 2)
    assert "are all auto. Set one." in refused("auto", "auto", "auto", 1)
    assert "must both be numbers" in refused("auto", "auto", 4, 1)
    assert "must both be numbers" in refused("auto", 4, "auto", 1)
