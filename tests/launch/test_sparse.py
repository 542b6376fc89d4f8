"""Sparse accumulation by DeepSpeed's ZenFlow is refused wherever it is asked for, with the reason
(docs/sparse_accumulation.md).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.launch.config_file import read_launch_file
from finetune.recipe.foreign_keys import SAID_IN_WORDS
from finetune.recipe.load import load_recipe

NO_ZENFLOW = SAID_IN_WORDS["zenflow"]
ROOT = Path(__file__).resolve().parents[2]
MINIMAL = "model: {name_or_path: org/model}\ndata: {train: [{path: org/rows}]}\noutput_dir: x\n"
ZERO2 = (
    "distributed_type: DEEPSPEED\nnum_processes: 1\ndeepspeed_config:\n  zero_stage: 2\n  offload_optimizer_device:"
    " cpu\n"
)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("zenflow: {topk_ratio: 0.1, update_interval: 4}\n", "zenflow"),
        ("sparse: true\n", "sparse"),
        ("accumulation: {sparse: {topk_ratio: 0.1}}\n", "accumulation.sparse"),
        ("accumulation: {zenflow: true}\n", "accumulation.zenflow"),
        ("training: {zenflow: true}\n", "training.zenflow"),
        ("zero_optimization: {stage: 2, zenflow: {topk_ratio: 0.1}}\n", "zero_optimization"),
    ],
)
def test_a_recipe_that_asks_for_it_is_refused(tmp_path, text, key):
    (tmp_path / "recipe.yaml").write_text(MINIMAL + text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    (message,) = caught.value.messages
    assert f"recipe.yaml:4: {key} is not a key" in message and message.endswith(NO_ZENFLOW)


@pytest.mark.parametrize(("line", "text"), [(6, "  zenflow: {topk_ratio: 0.1}\n"), (6, "zenflow: true\n")])
def test_a_launch_file_that_asks_for_it_is_refused(tmp_path, line, text):
    (tmp_path / "launch.yaml").write_text(ZERO2 + text)
    with pytest.raises(UserError) as caught:
        read_launch_file(tmp_path / "launch.yaml")
    (message,) = caught.value.messages
    key = "deepspeed_config.zenflow" if text.startswith(" ") else "zenflow"
    assert message == f"{tmp_path}/launch.yaml:{line}: {key} is not supported here. {NO_ZENFLOW}"


def test_the_refusal_ends_a_training_before_weights_with_status_2(tmp_path):
    # there is no such model: had weights been looked for, they would be named
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    (tmp_path / "launch.yaml").write_text(ZERO2 + "  zenflow: {topk_ratio: 0.1}\n")
    command = [sys.executable, "-m", "finetune", "train", tmp_path / "recipe.yaml"]
    for arguments in (["--launch", tmp_path / "launch.yaml"], ["accumulation.sparse=true"]):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and NO_ZENFLOW in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr and "org/model" not in done.stderr


def test_the_way_out_exists():
    assert (ROOT / "docs" / "sparse_accumulation.md").exists()
    assert read_launch_file(ROOT / "accelerate_configs" / "zero2_offload.yaml").offload_optimizer == "cpu"
