"""Sizes as people write them: exact spellings give exact bytes, everything else a sentence that says what to write."""

import pytest

from finetune.recipe.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GB", 40_000_000_000),  # 40 x 10^9
        ("40GiB", 42_949_672_960),  # 40 x 1,073,741,824
        ("40 GiB", 42_949_672_960),  # one space
        ("1.5GiB", 1_610_612_736),  # 1.5 x 2^30 = 3 x 2^29 = 3 x 536,870,912
        ("0.1TB", 100_000_000_000),  # exact: a float product would be the same here, not for every number
        ("1.1GB", 1_100_000_000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("3MB", 3_000_000),
        ("3MiB", 3_145_728),  # 3 x 1,048,576
        ("2TB", 2_000_000_000_000),
        ("2TiB", 2_199_023_255_552),  # 2 x 2^40
        ("0.001KB", 1),
    ],
)
def test_exact_spellings_give_exact_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (40, "40 has no unit; write 40GiB (40 x 2^30 bytes) or 40GB (40 x 10^9)."),
        ("40", "40 has no unit; write 40GiB (40 x 2^30 bytes) or 40GB (40 x 10^9)."),
        (1.5, "1.5 has no unit; write 1.5GiB (1.5 x 2^30 bytes) or 1.5GB (1.5 x 10^9)."),
        ("40gib", "40gib is not spelt exactly; did you mean 40GiB?"),
        ("40Gi", "40Gi is not spelt exactly; did you mean 40GiB?"),
        ("40  GiB", "40  GiB is not spelt exactly; did you mean 40GiB?"),
        ("40G", "40G may mean powers of 1024 or of 1000; write 40GiB (40 x 2^30 bytes) or 40GB (40 x 10^9)."),
        ("40 gb", "40 gb may mean powers of 1024 or of 1000; write 40GiB (40 x 2^30 bytes) or 40GB (40 x 10^9)."),
        ("512m", "512m may mean powers of 1024 or of 1000; write 512MiB (512 x 2^20 bytes) or 512MB (512 x 10^6)."),
        ("0GiB", "0GiB is less than one byte; write a size above 0, such as 40GiB."),
        ("0.0001KB", "0.0001KB is less than one byte; write a size above 0, such as 40GiB."),
        ("-1GiB", "-1GiB is less than 0; write a size above 0, such as 40GiB."),
        (-40, "-40 is less than 0; write a size above 0, such as 40GiB."),
    ],
)
def test_other_spellings_are_refused_with_what_to_write(value, sentence):
    with pytest.raises(ValueError) as caught:
        parse_bytes(value)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "nan",
        "nanGiB",
        float("nan"),
        "inf",
        "GiB",
        "1e3GiB",
        "1_000MB",
        "1,5GiB",
        ".5GiB",
        "40GiB\n40GiB",
        "40PiB",
        "40B",
        True,
        None,
        "٤٠GiB",  # noqa: RUF001 - digits, but not ASCII ones
        "all",
    ],
)
def test_what_is_no_size_is_refused_with_the_units(value):
    with pytest.raises(ValueError, match=r"is no size; write a number and one of KB, KiB, MB, MiB, GB, GiB, TB, TiB"):
        parse_bytes(value)
