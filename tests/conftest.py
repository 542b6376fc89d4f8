"""What every test shares: the report at the end of a test run, and the fixtures below it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict

import pytest

os.environ.setdefault("FINETUNE_CPU_THREADS", "1")  # tests start processes that share two cores


@pytest.fixture(scope="session")
def saved_runs(tmp_path_factory):
    """Runs with checkpoints, by kind: see tests/support/saved_runs.py. Copy one before changing it."""
    from tests.support.saved_runs import SavedRuns

    return SavedRuns(tmp_path_factory.mktemp("saved"))


def pytest_collection_modifyitems(items: list) -> None:
    """Files with slow tests first: of two workers none then ends long before the other. Their order else stays."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter) -> None:
    """Minutes per area (the folder in tests/), and what was skipped and why."""
    seconds: dict[str, float] = defaultdict(float)
    tests: Counter[str] = Counter()
    skipped: Counter[tuple[str, str]] = Counter()
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if getattr(report, "when", None) not in ("setup", "call", "teardown"):
                continue  # collection errors and warnings have no phases
            area = _area(report.nodeid)
            seconds[area] += report.duration
            tests[area] += report.when == "call" or outcome == "skipped"
            if outcome == "skipped":
                skipped[report.nodeid.split("[")[0], _reason(report)] += 1
    if not tests:
        return
    terminalreporter.section("minutes per area")
    for area in sorted(seconds, key=seconds.get, reverse=True):
        terminalreporter.write_line(f"{seconds[area] / 60:6.2f}  {area} ({tests[area]} tests)")
    terminalreporter.write_line(f"{sum(seconds.values()) / 60:6.2f}  together")
    terminalreporter.section("skipped")
    for (test, reason), count in sorted(skipped.items()):
        terminalreporter.write_line(f"{test}{f' ({count} times)' if count > 1 else ''}: {reason}")
    terminalreporter.write_line(f"{sum(skipped.values())} skipped")


def _area(node_id: str) -> str:
    """ "tests/recipe/test_load.py::test_x" -> "recipe"."""
    folders = node_id.split("::")[0].split("/")[1:-1]
    return folders[0] if folders else "shape"


def _reason(report) -> str:
    longrepr = report.longrepr  # (file, line, "Skipped: why") for a skip, text for an expected failure
    return str(longrepr[2]).removeprefix("Skipped: ") if isinstance(longrepr, tuple) else str(report.wasxfail)
