#!/usr/bin/env python3
"""Measure how released DeepSpeed versions accumulate, and whether the start-up check and `finetune verify` catch the
wrong ones.

    python -m scripts.benchmarks.deepspeed_versions [--versions 0.16.9,0.19.8] [--out docs/benchmarks]

Each version is installed alone, in front of the packages of this environment, in a temporary folder with compiled ops
of its own, and runs scripts/benchmarks/deepspeed_case.py on two CPU ranks per ZeRO layout. Two to four minutes and one
download per version. Writes deepspeed-versions.json and, from it, deepspeed-versions.md; versions that are not asked
for keep their rows. Ends with status 1 when a version that trains wrongly is not caught, or one that is exact is
refused."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from packaging.version import Version

from finetune.launch.start import free_port
from tests.support.deepspeed_versions import GOOD_DEEPSPEED, KNOWN_BAD, LAYOUTS, agrees, cell, told, verdict
from tests.support.launch import environment, launch_file
from tests.support.tiny_models import small_recipe

ROOT = Path(__file__).resolve().parents[2]

VERSIONS = "0.16.9,0.17.6,0.18.2,0.18.3,0.18.5,0.18.7,0.18.9,0.19.0,0.19.3,0.19.8"
LAUNCH_SECONDS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--versions", default=VERSIONS, help=f"separated by commas (all: {VERSIONS}); '' writes the page only"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the .json and the .md"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "deepspeed-versions.json"
    rows = json.loads(results.read_text())["rows"] if results.exists() else []
    for version in filter(None, arguments.versions.split(",")):
        rows = [row for row in rows if row["version"] != version] + measure(version)
        rows.sort(key=lambda row: (Version(row["version"]), list(LAYOUTS).index(row["layout"])))
        versions = {name: importlib.metadata.version(name) for name in ("accelerate", "torch", "transformers")}
        versions["python"] = platform.python_version()
        results.write_text(json.dumps({"measured_with": versions, "rows": rows}, indent=1) + "\n")
    (arguments.out / "deepspeed-versions.md").write_text(page(json.loads(results.read_text())))
    slipped = [f"{row['version']}, {row['layout']}: {told(row)}" for row in rows if not agrees(row)]
    print(
        "\n".join(
            ["not as it should be:", *slipped] if slipped else ["every wrong version is caught, every exact one passes"]
        )
    )
    return 1 if slipped else 0


def measure(version: str) -> list[dict]:
    """The rows of one version, all layouts, in an environment that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="deepspeed-versions-") as name:
        folder = Path(name)
        reason = install(version, folder / "packages")
        recipe = small_recipe(folder / "recipe")
        rows = []
        for layout in LAYOUTS:
            found = {"unknown": reason} if reason else run_case(version, layout, recipe, folder)
            rows.append({"version": version, "layout": layout, **found})
            print(f"deepspeed {version}, {layout}: {verdict(found.get('ours', found))}; {told(rows[-1])}", flush=True)
    return rows


def install(version: str, folder: Path) -> str:
    """Install this version of DeepSpeed, and nothing else, into `folder`; "" or why that failed."""
    print(f"deepspeed {version}: installing", flush=True)
    # its setup.py imports the torch that is here, and must not compile the ops
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(folder),
    ]
    done = subprocess.run(
        [*command, f"deepspeed=={version}"],
        env=environment(DS_BUILD_OPS="0", DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
    )
    return "" if done.returncode == 0 else f"pip: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"


def run_case(version: str, layout: str, recipe: Path, folder: Path) -> dict:
    """One launch of two ranks; what the case wrote, or {"unknown": reason}."""
    stage, optimizer, parameters = LAYOUTS[layout]
    out = folder / "case" / "out.json"
    out.parent.mkdir(exist_ok=True)
    for old in out.parent.iterdir():
        old.unlink()
    config = launch_file(folder / "launch.yaml", 2, stage, optimizer, parameters)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        str(free_port()),
        "-m",
        "scripts.benchmarks.deepspeed_case",
        str(recipe),
        str(out),
    ]
    packages = folder / "packages"
    env = environment(
        PYTHONPATH=os.pathsep.join([str(packages), str(ROOT)]),
        DS_ACCELERATOR="cpu",
        TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
        FINETUNE_CACHE=str(folder / "cache"),
    )
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
        try:
            process.wait(LAUNCH_SECONDS)
        except subprocess.TimeoutExpired:
            # torchrun's ranks have sessions of their own: they outlive the launcher unless they are named
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            process.wait()
    if not out.exists():
        errors = [line for line in log.read_text().splitlines() if "Error: " in line]
        return {"unknown": (errors or [f"the launch ended with status {process.returncode} and no result"])[0].strip()}
    found = json.loads(out.read_text())
    assert found.pop("deepspeed") == version and Path(found["file"]).is_relative_to(packages), found
    found["file"] = str(Path(found["file"]).relative_to(folder))
    missing = {"unknown": f"no result within {LAUNCH_SECONDS} s"}
    return {
        "file": found["file"],
        **{part: found.get(part, missing) for part in ("ours", "accumulate", "selfcheck", "verify")},
    }


def table(rows: list[dict], text) -> list[str]:
    """Markdown lines: a line per version, a column per layout, `text(row)` in the cells."""
    lines = ["| DeepSpeed | " + " | ".join(LAYOUTS) + " |", "|---" * (len(LAYOUTS) + 1) + "|"]
    for version in dict.fromkeys(row["version"] for row in rows):
        cells = {row["layout"]: text(row) for row in rows if row["version"] == version}
        lines.append(f"| {version} | " + " | ".join(cells.get(layout, "") for layout in LAYOUTS) + " |")
    return lines


def page(results: dict) -> str:
    """docs/benchmarks/deepspeed-versions.md."""
    rows, versions = results["rows"], results["measured_with"]
    bad = [
        f"- {row.first}{'' if row.first == row.last else f' to {row.last}'}, ZeRO-{' and '.join(map(str, row.stages))}"
        f"{' with CPU offload' if row.offload else ''}: {row.symptom}." + (f" <{row.thread}>" if row.thread else "")
        for row in KNOWN_BAD
    ]
    slipped = [f"{row['version']} with {row['layout']}" for row in rows if not agrees(row)]
    unknown = [f"- {row['version']}, {row['layout']}: {row['unknown']}" for row in rows if "unknown" in row]
    return "\n".join(
        [
            "# How released DeepSpeed versions accumulate",
            "",
            (
                "Written by `python -m scripts.benchmarks.deepspeed_versions`, which installs each version in a"
                " throw-away environment; raw figures in `deepspeed-versions.json`."
            ),
            "2 CPU ranks, K = 4, float32, ragged rows, four AdamW steps with adam_epsilon 1e-6, clipped at 1.0; "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + ".",
            (
                "A cell is the relative difference of the weights from four big batches without an engine (right: 1e-7"
                " and less); a wrong one is bold, with the first window's gradient norm over the true one. AdamW hides"
                " a wrong factor from the weights, clipping too: so both count."
            ),
            "",
            "## As this project accumulates",
            "",
            (
                "Without the start-up check: the boundary flag ends a window, and accelerate's DeepSpeed wrapper does"
                " the rest."
            ),
            "",
            *table(rows, lambda row: cell(row.get("ours", row))),
            "",
            "## With accelerate's `accumulate()`",
            "",
            (
                "The loop of accelerate's documentation. Under ZeRO-1 it enters DeepSpeed's `no_sync`, in which"
                " DeepSpeed before 0.18.3 does not divide the loss by K: all micro-batches but a window's last count K"
                " times. This project never enters `no_sync` under DeepSpeed."
            ),
            "",
            *table(rows, lambda row: cell(row.get("accumulate", row))),
            "",
            "## What the start-up check and `finetune verify` say",
            "",
            (
                "The start-up check passes or refuses to train (status 2); `finetune verify` ends with status 0 or 4,"
                " or with DeepSpeed's own traceback where the step crashes. They judge the engine as this project uses"
                " it, the first table."
            ),
            "",
            *table(rows, told),
            "",
            (
                f"Not as it should be: {'; '.join(slipped)}."
                if slipped
                else "Every version that is wrong or crashes is caught by both, and every exact one passes both."
            ),
            "",
            *(["Not measured:", "", *unknown, ""] if unknown else []),
            "## The errors",
            "",
            (
                f"As `KNOWN_BAD` in `tests/support/deepspeed_versions.py` has them; {GOOD_DEEPSPEED} and later"
                " are exact. The links are upstream's reports and repairs; releases between those of the tables were"
                " not run."
            ),
            "",
            *bad,
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
