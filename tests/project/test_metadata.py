"""What stands in several files is the same in all: version, licence, Python versions, pins, the command of CI."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import finetune

ROOT = Path(__file__).resolve().parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
EXTRAS = dict(SETUP["options.extras_require"])
PYTHONS = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


PINS = {
    canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in requirements(read("constraints.txt"))
}


def test_one_version_in_all_files():
    citation = yaml.safe_load(read("CITATION.cff"))
    newest = re.search(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)[1]
    assert SETUP["metadata"]["version"] == "attr: finetune.__version__"
    assert finetune.__version__ == citation["version"] == newest


def test_one_licence_and_no_person():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert "Apache License" in read("LICENSE") and "Version 2.0" in read("LICENSE")
    assert SETUP["metadata"]["license"] == citation["license"] == "Apache-2.0"
    assert (
        [author["name"] for author in citation["authors"]] == [SETUP["metadata"]["author"]] == ["The finetune authors"]
    )


def test_every_requirement_has_a_pin_within_its_range():
    groups = {"": SETUP["options"]["install_requires"], **EXTRAS}
    for group, text in groups.items():
        for requirement in requirements(text):
            pin = PINS.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{requirement.name} ({group or 'install_requires'}) is not in constraints.txt"
            assert pin in requirement.specifier, f"{requirement}: constraints.txt has {pin}"


def test_what_the_requirements_need_in_turn_is_pinned_too():
    loose, seen = set(), set()
    todo = [("finetune", extra) for extra in ("", *EXTRAS)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen or name.startswith(("nvidia-", "cuda-", "triton")):  # torch's own, in its CUDA build
            continue
        seen.add((name, extra))
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a group that is not installed here
        for requirement in map(Requirement, needs):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                other = canonicalize_name(requirement.name)
                todo += [(other, asked) for asked in ("", *requirement.extras)]
                loose |= {other} - PINS.keys()
    assert len(seen) > 50
    assert {name for name in loose if not name.startswith(("nvidia-", "cuda-", "triton"))} <= {"setuptools"}


def test_the_python_versions_are_those_that_ci_runs():
    workflow = yaml.load(read(".github/workflows/ci.yml"), yaml.BaseLoader)  # `on` is a word, not a truth
    assert set(workflow["on"]) == {"pull_request", "schedule", "workflow_dispatch"}
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == PYTHONS
    assert SETUP["options"]["python_requires"] == f">={PYTHONS[0]}"
    assert PYTHONS[0] in re.search(r"No Python (\S+) or newer", read("scripts/env.sh"))[1]
    assert f'target-version = "py{PYTHONS[0].replace(".", "")}"' in read("ruff.toml")
    assert f'python_version = "{PYTHONS[0]}"' in read("pyproject.toml")


def test_the_workflow_calls_what_anybody_can_run():
    workflow = yaml.load(read(".github/workflows/ci.yml"), yaml.BaseLoader)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = {step["if"]: step["run"] for step in steps if "run" in step}
    asked = "github.event_name == 'pull_request'"
    assert commands == {asked: ".ci/run --quick", asked.replace("==", "!="): ".ci/run"}
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("target", ["quickstart", "test", "quality", "docs"])
def test_a_make_target_is_a_script(target):
    script = re.search(rf"^{target}:.*\n\t(\S+)$", read("Makefile"), re.MULTILINE)[1]
    assert os.access(ROOT / script, os.X_OK)


def test_a_bug_report_asks_for_what_a_run_wrote():
    form = yaml.safe_load(read(".github/ISSUE_TEMPLATE/bug.yml"))
    asked = {
        part["attributes"]["label"] for part in form["body"] if part["type"] != "markdown" and "validations" in part
    }
    assert {"run.json", "finetune check --json", "finetune --version"} <= asked
