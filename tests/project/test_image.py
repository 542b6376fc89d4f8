"""The Dockerfile, which is never built here: it is parsed, and its install lines are run in an empty environment."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME, VENV = "/opt/finetune", "/opt/venv"


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text) in order, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    # with what is new and not ignored, so that a file counts before its commit
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def ignored(name: str) -> bool:
    """Whether .dockerignore leaves a file of the repository out. As much of its rules as ours uses."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    parts = name.split("/")
    prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]

    def matches(rule: str) -> bool:
        if rule.startswith("**/"):
            return any(fnmatch.fnmatchcase(part, rule.removeprefix("**/")) for part in parts)
        return any(fnmatch.fnmatchcase(prefix, rule) and prefix.count("/") == rule.count("/") for prefix in prefixes)

    return any(map(matches, rules))


def test_both_devices_are_stages_and_cpu_is_the_default():
    steps = instructions()
    assert steps[0] == ("ARG", "DEVICE=cpu")
    sources = [text for word, text in steps if word == "FROM"]
    assert [source.partition(" AS ")[2] for source in sources] == ["cpu", "cuda", ""]
    assert sources[-1] == "${DEVICE}"
    assert {word for word, _ in steps} <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    for word in ("ENTRYPOINT", "CMD"):
        (said,) = [text for instruction, text in steps if instruction == word]
        assert all(isinstance(part, str) for part in json.loads(said))


def test_no_file_of_the_repository_is_left_out_of_the_image():
    names = tracked()
    assert len(names) > 100
    assert not [name for name in names if ignored(name)]
    for name in (
        ".git/config",
        ".venv/bin/python",
        "finetune/__pycache__/x.pyc",
        "runs/x/run.json",
        "finetune.egg-info/PKG-INFO",
    ):
        assert ignored(name), name


def test_the_paths_in_its_comments_and_lines_exist():
    for path in re.findall(rf"{HOME}/(\S+\.\w+)", (ROOT / "Dockerfile").read_text()):
        assert (ROOT / path).is_file(), path


@pytest.mark.slow
def test_its_install_lines_install_the_package_in_an_empty_environment(tmp_path):
    """Without dependencies, which are those of this environment; with the index that this machine uses."""
    home, environment = tmp_path / "checkout", tmp_path / "venv"
    home.mkdir()
    venv.create(environment, with_pip=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"PATH": f"{environment}/bin:{os.environ['PATH']}", "PIP_NO_DEPS": "1"}
    installed = 0
    for word, text in instructions():
        if word == "COPY":
            *sources, target = text.split()
            copy(sources, home / target)
        if word == "RUN" and "pip install" in text:
            done = subprocess.run(text, shell=True, cwd=home, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            installed += 1
    assert installed == 2
    program = (
        "import importlib.metadata, importlib.resources as r, finetune\n"
        "print(finetune.__file__, finetune.__version__ == importlib.metadata.version('finetune'),\n"
        "      all((r.files(finetune) / name).is_file() for name in ('recipe.schema.json', 'py.typed')))"
    )
    done = subprocess.run(
        [environment / "bin/python", "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(home / "finetune/__init__.py"), "True", "True"], done.stderr
    assert os.access(environment / "bin/finetune", os.X_OK)


def copy(sources: list[str], target: Path) -> None:
    """COPY, from the files of the repository that .dockerignore lets through."""
    for name in tracked():
        for source in sources:
            if (source != "." and name != source) or ignored(name):
                continue
            there = target / (name if source == "." else Path(name).name)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, there)
    assert all(source == "." or (ROOT / source).is_file() for source in sources)
