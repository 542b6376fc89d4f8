"""The shape of the house (docs/architecture.md): which module may import which, where special cases live, how long things are."""

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

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finetune"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports from its own row and the rows below; the rooms of row 5 never import each other. A package is one room.
ROWS: dict[str, int] = {
    **dict.fromkeys(("train", "cli", "__main__", "launcher"), 9),
    **dict.fromkeys(("run", "follow", "resume", "launching", "check", "verify", "inspect_data", "generate", "merge",
                     "checkpoints", "checkpoint_export", "out_of_memory", "confirm", "plan", "plan_document"), 8),
    **dict.fromkeys(("loop", "job", "one_batch"), 7),
    **dict.fromkeys(("trained",), 6),
    **dict.fromkeys(("model", "data", "objectives", "optim", "export", "checkpoint"), 5),
    **dict.fromkeys(("backend",), 4),
    **dict.fromkeys(("report",), 3),
    **dict.fromkeys(("memory.trace", "memory.estimate", "memory.auto", "memory.account", "memory.fit"), 6), "memory": 2,
    **dict.fromkeys(("windows", "schedule", "noise_scale", "preflight", "manifest", "snapshots", "run_lock", "stopping", "spikes",
                     "output_folder", "watchdog", "limits"), 1),
    **dict.fromkeys(("launch", "launch_args", "launch_file", "compatibility"), 0),
    **dict.fromkeys(("recipe", "recipe_check", "recipe_fields", "recipe_include", "recipe_rules", "recipe_yaml"), 0),
    **dict.fromkeys(("suggest", "foreign_names", "errors", "exits", "ends", "whereabouts", "redact", "sizes"), 0),
}
TORCH_FREE = [room for room, row in ROWS.items() if row <= 1] + ["run", "launching", "verify", "checkpoints", "cli", "backend.parents"]
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "peft", "bitsandbytes")
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_STEP_LINES = 300, 60, 45


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    """`backend.engine` for finetune/backend/engine.py, `backend` for its __init__.py."""
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
    """The module's own row where it has one, else its package's, or itself."""
    return name if name in ROWS else name.split(".")[0]


def modules() -> list[Path]:
    return [file for file in FILES if name_of(file)]


def test_every_module_has_a_row_and_every_row_its_module():
    assert {room_of(name_of(file)) for file in modules()} == set(ROWS)


def test_imports_point_down():
    wrong = []
    for file in modules():
        room = room_of(name_of(file))
        for line, name in own_imports(file):
            other = room_of(name)
            if other == room:
                continue
            if ROWS[other] > ROWS[room] or ROWS[other] == ROWS[room] == 5:
                wrong.append(f"{place(file, line)}: {room} (row {ROWS[room]}) imports {name} (row {ROWS[other]})")
    assert not wrong, "\n".join(wrong)


def test_imports_make_no_circle():
    packages = {name_of(file) for file in FILES if file.name == "__init__.py"}
    graph = {
        name_of(file): {name for _, name in own_imports(file) if name != name_of(file)} for file in modules()
    }
    for package in packages & set(graph):  # a package's __init__ gathers its own modules
        for name in graph:
            if name.startswith(package + "."):
                graph[name].discard(package)
    TopologicalSorter(graph).prepare()


def test_deepspeed_bitsandbytes_and_cuda_stay_in_the_backend():
    wrong = []
    for file in modules():
        if name_of(file).startswith("backend"):
            continue
        found = [line for line, name in imports(file)
                 if name.split(".")[0] in ("deepspeed", "bitsandbytes") or name.startswith("torch.cuda")]  # fmt: skip
        found += [node.lineno for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute) and node.attr == "cuda"]
        wrong += [place(file, line) for line in found]
    assert not wrong, wrong


def test_the_bottom_rows_and_the_entry_points_start_without_the_libraries():
    code = "import importlib, sys\nfor name in sys.argv[1].split(): importlib.import_module('finetune.' + name)\n"
    code += f"print([name for name in {LIBRARIES} if name in sys.modules])"
    command = [sys.executable, "-c", code, " ".join(TORCH_FREE)]
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
    long = [f"{place(file, f.lineno)}: {f.name} has {lines_of(f)} lines" for file, f in functions()
            if lines_of(f) > MOST_FUNCTION_LINES]  # fmt: skip
    assert not long, "\n".join(long)


def test_the_training_step_fits_one_screen():
    (step,) = [f for file, f in functions() if name_of(file) == "loop" and f.name == "train_window"]
    assert lines_of(step) <= MOST_STEP_LINES


def test_broad_handlers_raise_again_or_say_why():
    wrong = []
    for file in FILES:
        lines = file.read_text().splitlines()
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            raises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if broad and not raises and not re.search(r"# noqa: \S+ - \S", lines[node.lineno - 1]):
                wrong.append(place(file, node.lineno))
            if node.type is not None and "ImportError" in ast.unparse(node.type) and name_of(file) != "backend.kernels":
                wrong.append(f"{place(file, node.lineno)}: optional imports are resolved in backend/kernels.py")
    assert not wrong, wrong


def test_the_picture_names_every_module():
    picture = (ROOT / "docs" / "architecture.md").read_text()
    missing = [room for room in ROWS if f"{room.rpartition('.')[2]}.py" not in picture and f"{room}/" not in picture]
    assert not missing, missing
