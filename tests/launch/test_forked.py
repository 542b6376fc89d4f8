"""Ranks that tests fork from imported libraries are those of `accelerate launch`: same run, same environment, same
exit status.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support import forked, launch
from tests.support.resume_table import KILLED, differences
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow

SETTINGS = ("training.max_steps=4", "checkpoint.save_steps=2", "evaluation.eval_steps=2")
VARIES = {"OLDPWD", "PWD", "SHLVL", "_"}  # a shell's
OWN = {"MASTER_PORT", "TORCHELASTIC_ERROR_FILE"}  # of each launch
AGENT = {"TORCHELASTIC_USE_AGENT_STORE"}  # there is no agent: rank 0 has the store itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forked")
    small_recipe(folder)
    launch.launch_file(folder / "launch.yaml", 2, zero_stage=2)
    return folder


def test_a_run_is_bitwise_the_launchers(folder):
    for name, way in (("launched", launch), ("forked", forked)):
        output, env = f"output_dir={folder / name}", {"FINETUNE_CACHE": str(folder / "cache")}
        done = way.train(folder / "launch.yaml", folder / "recipe.yaml", *SETTINGS, output, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
    assert differences(folder / "forked", folder / "launched") == []
    for name in ("run.json", "deepspeed.json"):
        found = [json.loads((folder / way / name).read_text()) for way in ("launched", "forked")]
        assert found[0].keys() == found[1].keys()
    assert found[0] == found[1], "DeepSpeed's settings"


def test_a_rank_finds_the_launchers_environment_and_command_line(folder):
    found = []
    for way in (launch, forked):
        out = folder / f"{way.__name__}.json"
        done = way.accelerate(folder / "launch.yaml", *launch.program("surroundings"), out, "an argument")
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([json.loads(out.with_suffix(f".{rank}").read_text()) for rank in (0, 1)])
    for launched, ours in zip(*found, strict=True):
        differ = {n for n in launched["environ"].keys() | ours["environ"] if n not in VARIES | OWN}
        assert {n for n in differ if launched["environ"].get(n) != ours["environ"].get(n)} <= AGENT
        assert ours["environ"].keys() >= OWN
        for same in ("arguments", "path", "folder", "launched_by", "command", "threads"):
            assert ours[same] == launched[same], same


def test_statuses_are_the_ranks_own(folder):
    file, arguments = folder / "launch.yaml", (folder / "recipe.yaml", *SETTINGS, f"output_dir={folder / 'killed'}")
    done = forked.accelerate(file, *KILLED, "3", *arguments)
    assert done.returncode == 1 and done.statuses[0] == -9 and done.statuses[1] != 0
    done = forked.run([sys.executable, launch.TRAIN, folder / "recipe.yaml", "training.sed=1"])
    assert (done.returncode, done.statuses) == (2, (2,)) and "training.sed" in done.stderr
    done = forked.run([sys.executable, *KILLED, "3", *arguments, "checkpoint.resume=never"])
    assert done.returncode == -9
