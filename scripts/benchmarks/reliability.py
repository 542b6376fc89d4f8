#!/usr/bin/env python
"""Kills, damage and stops by the hundred: does a run always go on, bit for bit, and is nothing silent?

    python -m scripts.benchmarks.reliability [--kills 16] [--minutes 10] [--cross 0] [--seed 1] [--output
    docs/benchmarks]

Writes reliability.md and reliability.json; progress goes to stderr. Tiny models on the CPU, at most three ranks. Needs
the test requirements. In this order: kills at every operation of a save; every file of a checkpoint damaged in every
way; SIGTERM to `finetune train`; every process of real launches killed at random moments, until --kills are done or
--minutes are over (never fewer than one launch of each kind); then, with --cross N, N of the 270 combinations of
engine, precision, kind of training, data and schedule, drawn by the seed, each killed in its first epoch and in a later
one (--cross 270: all, some 10 hours on two cores). Ends with status 4 when a run was lost or anything was silent."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetune.checkpoint import snapshots
from finetune.errors import UserError
from finetune.launch import compatibility
from finetune.launch.config_file import read_launch_file
from finetune.recipe.load import load_recipe
from tests.support import kill_points
from tests.support.launch import TRAIN, accelerate, environment, launch_file
from tests.support.random_kills import (
    KILLS_PER_RUN,
    LAUNCHES,
    SECONDS,
    Bench,
    kill_chain,
    left_behind,
    make_bench,
    say,
    steps_of,
    wait_for_step,
)
from tests.support.resume_table import KILLED, cross, differences, logged, overrides_of

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes", "safetensors")
FOR_EVER = {"training.max_steps": 1_000_000, "checkpoint.save_steps": 1_000_000, "evaluation.eval_steps": 1_000_000}
CROSS_KILLS = (4, 18)  # steps: in the first epoch, and in a later one
CLEAN = "clean stop: status 3, saved, nothing left"


# ---- one save, killed at every operation


def kill_every_operation(folder: Path) -> list[dict]:
    """tests/support/kill_points.py in a process of its own, for each of its scenarios."""
    found = []
    for scenario in kill_points.SCENARIOS:
        place = folder / scenario
        command = [sys.executable, kill_points.__file__, "kill", scenario, str(place)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment(PYTHONPATH=str(ROOT))
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        shutil.rmtree(place)
        found.append({"scenario": scenario} | result)
        say(
            f"save, {scenario}: {result['points']} points, {result['old']} old and {result['new']} new, wrong:"
            f" {result['wrong']}"
        )
    return found


# ---- damage


def damages(choose: random.Random, older: Path) -> dict:
    """Ways to spoil a file; `older` is the same file in the checkpoint before."""
    return {
        "flipped": lambda p: kill_points.flip(p, choose.randrange(p.stat().st_size), choose.randrange(8)),
        "truncated": lambda p: os.truncate(p, choose.randrange(1, p.stat().st_size)),
        "emptied": lambda p: os.truncate(p, 0),
        "deleted": lambda p: p.unlink(),
        "swapped": lambda p: shutil.copyfile(older, p),
        "lengthened": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    }


def damage_everything(bench: Bench, kind: str) -> dict:
    """Every file of the newest checkpoint of an unbroken run, in every way: is it named, and is the one before
    taken?
    """
    result = {"launch": kind, "points": 0, "files": 0, "undetected": [], "same_bytes": 0}
    choose = random.Random(f"{bench.seed} damage {kind}")
    root = bench.folder / "damaged" / "checkpoints"
    shutil.copytree(bench.unbroken(kind) / "checkpoints", root)
    before, last = snapshots.candidates(root)
    for path in sorted(p for p in last.rglob("*") if p.is_file()):
        result["files"] += 1
        older, content = before / path.relative_to(last), path.read_bytes()
        for name, spoil in damages(choose, older).items():
            spoil(path)
            if path.exists() and path.read_bytes() == content:
                result["same_bytes"] += 1  # the same in both checkpoints: no damage
                continue
            said: list[str] = []
            found = snapshots.newest(root, said.append)
            result["points"] += 1
            if found is None or found.folder != before or not (said and path.name in said[0]):
                result["undetected"].append(f"{path.relative_to(last)} {name}")
            path.write_bytes(content)
    shutil.rmtree(root.parent)
    say(f"damage, {kind}: {result['points']} points on {result['files']} files, undetected: {result['undetected']}")
    return result


# ---- real launches


def stop_cleanly(bench: Bench, kind: str) -> dict:
    """SIGTERM to `finetune train` between two steps: seconds until it has saved and ended, and who is left."""
    output = bench.folder / f"stopped-{kind.split()[0]}"
    process = bench.start(kind, output, FOR_EVER)
    wait_for_step(process, output, 3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = process.wait(SECONDS)
    seconds = time.monotonic() - began
    saved = [s.step for s in snapshots.listing(output / "checkpoints") if not s.problems]
    orphans = left_behind(output)
    for one in orphans:
        one.kill()
    good = code == 3 and saved == [steps_of(output)] and not orphans
    how = (
        CLEAN
        if good
        else (
            f"status {code}, saved {saved} of {steps_of(output)} steps:"
            f" {output.with_suffix('.log').read_text()[-1500:]}"
        )
    )
    say(f"stop, {kind}: {seconds:.2f} s, {how}")
    return {"launch": kind, "seconds": round(seconds, 2), "orphans": len(orphans), "how": how}


# ---- the cross


def refused(run, recipe_path: Path, overrides: list[str], file: Path) -> str:
    """Why this combination cannot be trained, or "": the recipe's own words."""
    try:
        loaded, strategy = load_recipe(recipe_path, overrides), read_launch_file(file)
        why = "; ".join(map(str, compatibility.refusals(loaded, strategy)))
    except UserError as error:
        why = str(error)
    return why.replace(str(file), file.name)


def cross_case(bench: Bench, number: int, name: str, run) -> dict:
    """One combination: unbroken, then killed at both steps of CROSS_KILLS and resumed."""
    folder = bench.folder / f"cross-{number}"
    folder.mkdir()
    overrides = [*overrides_of(run, bench.recipe, folder), "checkpoint.save_steps=2"]
    overrides.remove("checkpoint.save_steps=4")
    file, env = launch_file(folder / "launch.yaml", **run.launch), {"FINETUNE_CACHE": str(bench.folder / "cache")}
    result: dict = {
        "name": name,
        "refused": refused(run, bench.recipe, overrides, file),
        "epochs": [],
        "lost": "",
        "differences": [],
    }
    if result["refused"]:
        return result
    whole, broken = folder / "whole", folder / "broken"
    programs = [((TRAIN,), [], whole), *((KILLED, [str(step)], broken) for step in CROSS_KILLS), ((TRAIN,), [], broken)]
    for started, arguments, output in programs:
        done = accelerate(
            file, *started, *arguments, bench.recipe, *overrides, f"output_dir={output}", env=env, timeout=SECONDS
        )
        if started == KILLED:
            rows = [row for row in logged(output) if "loss" in row]
            result["epochs"].append(rows[-1]["epoch"])
            bench.remove_locks()
        elif done.returncode != 0:
            result["lost"] = done.stderr[-2000:]
            break
    else:
        result["differences"] = differences(broken, whole)
    shutil.rmtree(folder)
    say(
        f"cross, {name}: killed in epochs {result['epochs']}, lost: {bool(result['lost'])}, differences:"
        f" {result['differences'][:2]}"
    )
    return result


# ---- the page


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def summary(found: dict) -> list[tuple]:
    """A line per kind of attack: points tried, runs lost, silent differences, undetected corruptions, orphans, seconds
    to a stop.
    """
    rows: list[tuple] = []
    saves = found["saves"]
    wrong = sum(len(row["wrong"]) for row in saves)
    save = "a save killed before every operation, and in the middle of every write"
    rows.append((save, sum(r["points"] for r in saves), wrong, 0, "-", "-", "-"))
    damage = found["damage"]
    undetected = sum(len(r["undetected"]) for r in damage)
    rows.append(("a checkpoint's file damaged", sum(r["points"] for r in damage), "-", "-", undetected, "-", "-"))
    for kind in LAUNCHES:
        chains = [row for row in found["kills"] if row["launch"] == kind]
        stops = [row["seconds"] for row in found["stops"] if row["launch"] == kind]
        left = sum(row["orphans"] for row in chains + [r for r in found["stops"] if r["launch"] == kind])
        rows.append(
            (
                f"{kind}: all its processes killed",
                sum(len(r["kills"]) for r in chains),
                sum(bool(r["lost"]) for r in chains),
                sum(bool(r["differences"]) for r in chains),
                "-",
                left,
                max(stops) if stops else "-",
            )
        )
    ran = [row for row in found["cross"] if not row["refused"]]
    if ran:
        rows.append(
            (
                "combinations of the cross, each killed twice",
                2 * len(ran),
                sum(bool(r["lost"]) for r in ran),
                sum(bool(r["differences"]) for r in ran),
                "-",
                "-",
                "-",
            )
        )
    return rows


def failures(found: dict) -> list[str]:
    """Everything that must not happen, in words."""
    wrong = [f"save, {row['scenario']}: {text}" for row in found["saves"] for text in row["wrong"]]
    wrong += [
        f"damage, {row['launch']}: {text} was not noticed" for row in found["damage"] for text in row["undetected"]
    ]
    wrong += [f"stop, {row['launch']}: {row['how']}" for row in found["stops"] if row["how"] != CLEAN]
    for row in found["kills"] + found["cross"]:
        name = row.get("launch") or row.get("name")
        wrong += [f"{name}: lost: {row['lost']}"] * bool(row["lost"]) + [
            f"{name}: {text}" for text in row["differences"]
        ]
        wrong += [f"{name}: {left} processes were left behind"] if (left := row.get("orphans")) else []
    return wrong


def page(found: dict) -> str:
    """docs/benchmarks/reliability.md."""
    head = (
        "attack",
        "points tried",
        "runs lost",
        "silent differences",
        "undetected corruptions",
        "orphan processes",
        "seconds to a clean stop",
    )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    wrong = failures(found)
    ran, not_run = ([r for r in found["cross"] if bool(r["refused"]) == no] for no in (False, True))
    parts = [
        f"""\
# Reliability of saving, stopping and resuming

Written by `{found["command"]}` on {found["date"]}, commit {found["commit"]}, {found["machine"]}; {versions}.
It took {found["minutes"]:.1f} minutes.
What is attacked is a tiny model trained for 30 steps with a checkpoint after each, so that kills fall into saves; a
"silent difference" is a resumed run that ends well and is not, bit for bit, the unbroken one (losses, gradient norms,
learning rates, rows, held-out losses, exported weights).""",
        (
            "Nothing was lost, nothing was silent."
            if not wrong
            else "**Wrong:**\n\n" + "\n".join(f"- {text}" for text in wrong)
        ),
        table(head, summary(found)),
        "## Saves\n\nA child process saves and dies by SIGKILL before its n-th operation, for every n"
        " (tests/support/kill_points.py). After each, the checkpoint before or the new one must be there as it was"
        " written, and the next save must leave a clean folder.\n\n"
        + table(
            ("scenario", "points", "of them torn writes", "old one found", "new one found"),
            [(r["scenario"], r["points"], r["torn"], r["old"], r["new"]) for r in found["saves"]],
        ),
        "## Damage\n\nEvery file of the newest checkpoint flipped in one random bit, truncated, emptied, deleted,"
        " swapped with that of the checkpoint before, lengthened: it must be named, and the one before taken.\n\n"
        + table(
            ("launch", "files", "points", "undetected"),
            [(r["launch"], r["files"], r["points"], len(r["undetected"])) for r in found["damage"]],
        ),
        f"""\
## Kills

Every process of the tree gets SIGKILL at a random moment: one in five anywhere from the start, the others after
the first new step.
Up to {KILLS_PER_RUN} kills per run; then it is left to its end. Seed {found["seed"]}; each moment is in
reliability.json.
Locks of DeepSpeed's compiled ops that kills left behind, named by the next start: {found["locks"]}.

"""
        + table(
            ("launch", "runs", "kills", "before the first step was logged", "seconds of an unbroken run"),
            [
                (
                    kind,
                    len(chains),
                    sum(len(r["kills"]) for r in chains),
                    sum(k["logged_steps"] == 0 for r in chains for k in r["kills"]),
                    round(found["unbroken_seconds"][kind], 1),
                )
                for kind in LAUNCHES
                if (chains := [r for r in found["kills"] if r["launch"] == kind])
            ],
        ),
        "## Stops\n\nSIGTERM to `finetune train`; it must save, end with status 3 and leave no process.\n\n"
        + table(
            ("launch", "seconds", "how"),
            [(r["launch"], r["seconds"], r["how"].splitlines()[0]) for r in found["stops"]],
        ),
    ]
    if found["cross"]:
        parts.append(
            f"## The cross\n\n{len(ran)} of the {found['cross_size']} combinations were run (seed {found['seed']}),"
            f" each killed after steps {CROSS_KILLS[0]} and {CROSS_KILLS[1]}; {len(not_run)} drawn ones are refused by"
            " the recipe. A stream has no epochs: 0 there.\n\n"
            + table(
                ("combination", "killed in epochs", "lost", "bitwise the same"),
                [
                    (
                        r["name"],
                        ", ".join(f"{e:.2f}" for e in r["epochs"]),
                        "yes" if r["lost"] else "no",
                        "no" if r["differences"] or r["lost"] else "yes",
                    )
                    for r in ran
                ],
            )
        )
    return "\n\n".join(parts) + "\n"


def measure(bench: Bench, options: argparse.Namespace) -> dict:
    """Everything, in the order of the module's docstring."""
    deadline = time.monotonic() + 60 * options.minutes
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else bench.folder
    with tempfile.TemporaryDirectory(prefix="finetune-kills-", dir=memory) as place:
        found: dict = {"saves": kill_every_operation(Path(place))}
    found["damage"] = [damage_everything(bench, kind) for kind in LAUNCHES]
    found["stops"] = [stop_cleanly(bench, kind) for kind in LAUNCHES]
    found["kills"] = []
    number = 0
    while number < len(LAUNCHES) or (
        sum(len(r["kills"]) for r in found["kills"]) < options.kills and time.monotonic() < deadline
    ):
        found["kills"].append(kill_chain(bench, list(LAUNCHES)[number % len(LAUNCHES)], number, deadline))
        number += 1
    every = list(cross())
    found["cross"] = []
    for i, (name, run) in enumerate(random.Random(f"{bench.seed} cross").sample(every, len(every))):
        if sum(not row["refused"] for row in found["cross"]) < options.cross:
            found["cross"].append(cross_case(bench, i, name, run))
    found |= {
        "cross_size": len(every),
        "locks": bench.locks,
        "unbroken_seconds": {kind: s[0] for kind, s in bench.seconds.items()},
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=16, help="random kills of real launches, in all")
    parser.add_argument("--minutes", type=float, default=10, help="no new kill after this long")
    parser.add_argument("--cross", type=int, default=0, help="combinations of the cross")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks")
    options = parser.parse_args()
    began = time.monotonic()
    commit = (
        subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        or "unknown"
    )
    with tempfile.TemporaryDirectory(prefix="finetune-reliability-") as name:
        bench = make_bench(Path(name), options.seed)
        found = measure(bench, options)
    chosen = f"--kills {options.kills} --minutes {options.minutes:g} --cross {options.cross} --seed {options.seed}"
    found = {
        "command": f"python -m scripts.benchmarks.reliability {chosen}",
        "date": str(datetime.date.today()),
        "commit": commit,
        "machine": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seed": options.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
    } | found
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "reliability.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "reliability.md").write_text(page(found))
    say(f"written to {options.output}; wrong: {failures(found) or 'nothing'}")
    raise SystemExit(4 if failures(found) else 0)


if __name__ == "__main__":
    main()
