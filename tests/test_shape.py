"""The shape of the house (docs/architecture.md): which module may import which, where special cases live, how long
things are.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.rooms import PACKAGE, ROOMS, ROOT

FILES = sorted(PACKAGE.rglob("*.py"))

TORCH_FREE_ROOMS = ("errors", "recipe", "process", "batching", "launch")
TORCH_FREE = (
    *("report.redact", "report.run_folder", "report.console", "checkpoint.manifest", "checkpoint.snapshots"),
    *("checkpoint.survey", "model.parameters", "model.trained_folder", "commands.cli"),
)
# How many imports of our own stand inside functions: one where each command's first stage ends, and none elsewhere.
LATE_IMPORTS = {
    f"commands.{name}": 1
    for name in ("check", "checkpoints", "data", "export", "generate", "libraries", "plan", "train", "verify")
}
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "peft", "bitsandbytes")
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_STEP_LINES, MOST_FILES_IN_A_ROOM = 300, 60, 45, 16


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    """`engine.engine` for finetune/engine/engine.py, `engine` for its __init__.py."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, also inside functions. `from a import b` counts as a.b."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def own_imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) of a file's imports, without the package's own name."""
    modules = {name_of(f) for f in FILES}
    for line, name in imports(file):
        if name.split(".")[0] != "finetune":
            continue
        parts = name.split(".")[1:]
        known = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules), None)
        if known is not None:
            yield line, known


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def room_of(name: str) -> str:
    """The first part of a module's name: its room, or itself where it stands at the top."""
    return name.split(".")[0]


def modules() -> list[Path]:
    return [file for file in FILES if name_of(file)]


def test_every_module_is_in_a_room_of_the_order():
    assert {room_of(name_of(file)) for file in modules()} == set(ROOMS)


def test_imports_point_down():
    wrong = []
    for file in modules():
        room = room_of(name_of(file))
        for line, name in own_imports(file):
            other = room_of(name)
            if ROOMS.index(other) > ROOMS.index(room):
                wrong.append(f"{place(file, line)}: {room} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_a_rooms_init_says_its_purpose_in_one_line_and_nothing_else():
    for file in FILES:
        if file.name == "__init__.py" and name_of(file):
            (only,) = tree(file).body
            assert isinstance(only, ast.Expr) and "\n" not in only.value.value, file


def test_rooms_are_small_and_their_files_are_named_for_one_thing():
    for folder in {file.parent for file in modules()}:
        stems = [file.stem for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(stems) <= MOST_FILES_IN_A_ROOM, folder
        if folder != PACKAGE:
            assert not [stem for stem in stems if stem.startswith(f"{folder.name}_")], folder
            assert not set(stems) & {inner.name for inner in folder.iterdir() if inner.is_dir()}, folder


def test_our_own_modules_are_imported_at_the_top_of_a_file():
    """Inside a function stands only what follows a command's first stage, and what an entry point needs."""
    late = {
        name_of(file): len({node.lineno for function in own for node in ast.walk(function) if is_own_import(node)})
        for file in FILES
        if (own := [n for n in ast.walk(tree(file)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))])
    }
    assert {name: count for name, count in late.items() if count} == LATE_IMPORTS


def is_own_import(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] == "finetune"
    return isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "finetune" for alias in node.names)


def test_imports_make_no_circle():
    packages = {name_of(file) for file in FILES if file.name == "__init__.py"}
    graph = {name_of(file): {name for _, name in own_imports(file) if name != name_of(file)} for file in modules()}
    for package in packages & set(graph):  # a package's __init__ gathers its own modules
        for name in graph:
            if name.startswith(package + "."):
                graph[name].discard(package)
    TopologicalSorter(graph).prepare()


def test_deepspeed_bitsandbytes_and_cuda_stay_in_the_engine():
    wrong = []
    for file in modules():
        if room_of(name_of(file)) == "engine":
            continue
        found = [
            line
            for line, name in imports(file)
            if name.split(".")[0] in ("deepspeed", "bitsandbytes") or name.startswith("torch.cuda")
        ]
        found += [
            node.lineno for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute) and node.attr == "cuda"
        ]
        wrong += [place(file, line) for line in found]
    assert not wrong, wrong


def test_deepspeed_stays_in_its_own_folder_of_the_engine():
    wrong = [
        place(file, line)
        for file in modules()
        if not name_of(file).startswith("engine.deepspeed.")
        for line, name in imports(file)
        if name.split(".")[0] == "deepspeed"
    ]
    assert not wrong, wrong


def test_what_comes_before_the_first_stage_starts_without_the_libraries():
    names = [name_of(file) for file in modules() if room_of(name_of(file)) in TORCH_FREE_ROOMS] + [*TORCH_FREE]
    code = "import importlib, sys\nfor name in sys.argv[1].split(): importlib.import_module('finetune.' + name)\n"
    code += f"print([name for name in {LIBRARIES} if name in sys.modules])"
    command = [sys.executable, "-c", code, " ".join(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_module_is_named_like_a_library(library):
    # `accelerate launch finetune/train.py` puts finetune/ on sys.path, where such a module would shadow the real one
    assert not (PACKAGE / f"{library}.py").exists() and not (PACKAGE / library).exists()


def test_files_are_short():
    long = {str(f.relative_to(ROOT)): n for f in FILES if (n := len(f.read_text().splitlines())) > MOST_FILE_LINES}
    assert not long, long


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for file in FILES:
        yield from ((file, n) for n in ast.walk(tree(file)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def lines_of(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def test_functions_are_short():
    long = [
        f"{place(file, f.lineno)}: {f.name} has {lines_of(f)} lines"
        for file, f in functions()
        if lines_of(f) > MOST_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_the_training_step_fits_one_screen():
    (step,) = [f for file, f in functions() if name_of(file) == "training.step" and f.name == "train_window"]
    assert lines_of(step) <= MOST_STEP_LINES


def test_broad_handlers_raise_again_or_say_why():
    wrong = []
    for file in FILES:
        lines = file.read_text().splitlines()
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            raises = isinstance(node.body[-1], ast.Raise)
            if broad and not raises and not re.search(r"# noqa: \S+ - \S", lines[node.lineno - 1]):
                wrong.append(place(file, node.lineno))
            if node.type is not None and "ImportError" in ast.unparse(node.type) and name_of(file) != "model.facts":
                wrong.append(f"{place(file, node.lineno)}: optional imports are resolved in model/facts.py")
    assert not wrong, wrong


def test_scripts_use_what_tests_share_and_tests_import_no_script():
    wrong = [
        f"{place(file, line)}: {name}"
        for folder, allowed in (("tests", ("finetune", "tests")), ("scripts", ("finetune", "tests.support", "scripts")))
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports(file)
        if name.split(".")[0] in ("finetune", "tests", "scripts")
        and not any(name == each or name.startswith(f"{each}.") for each in allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_page_of_the_architecture_is_what_the_code_says():
    done = subprocess.run([sys.executable, "-m", "scripts.docs.architecture", "--check"], cwd=ROOT)
    assert done.returncode == 0
