"""logging.report_to: the tracker gets the numbers of metrics.jsonl; one that fails costs one warning, and never the
run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.launch import TRAIN, run
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return small_recipe(tmp_path_factory.mktemp("trackers"))


def train(recipe: Path, output: Path, names: str = "[tensorboard]"):
    settings = [f"output_dir={output}", "training.max_steps=3", f"logging.report_to={names}"]
    return run([sys.executable, TRAIN, recipe, *settings])


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_gets_what_metrics_jsonl_gets(recipe, tmp_path):
    done = train(recipe, tmp_path / "run")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[-3000:]
    events = EventAccumulator(str(tmp_path / "run/trackers/run")).Reload()
    for key in ("loss", "learning_rate", "eval_loss"):
        logged = [(row["step"], row[key]) for row in rows(tmp_path / "run") if key in row]
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        assert [step for step, _ in shown] == [step for step, _ in logged]
        # float32 in the event file
        assert [value for _, value in shown] == pytest.approx([value for _, value in logged], rel=1e-6)


def test_a_tracker_that_is_down_costs_one_warning(recipe, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "trackers").write_text("a file where a folder must be made")
    done = train(recipe, output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("warning: logging.report_to: tensorboard failed (") == 1
    assert [row["step"] for row in rows(output) if "loss" in row] == [1, 2, 3]


def test_one_that_is_not_installed_is_refused_before_anything_is_loaded(recipe, tmp_path):
    done = train(recipe, tmp_path / "run", "[aim]")
    assert done.returncode == 2
    assert "logging.report_to names aim, which is not installed here. `pip install aim`" in done.stderr.splitlines()[-1]
