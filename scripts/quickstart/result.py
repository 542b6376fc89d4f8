#!/usr/bin/env python3
"""Print what the quick start's fine-tuning changed.

    python -m scripts.quickstart.result RUN

RUN is the run's folder. Beside it lie RUN-before.json and RUN-after.json where scripts.quickstart.call_accuracy wrote
them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """One line about the held-out loss; one about the right answers where they were counted."""
    run = Path(sys.argv[1])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    (_, first), (step, last) = losses[0], losses[-1]
    print(f"held-out loss: {first:.4f} at step 0, {last:.4f} at step {step} ({(last - first) / first:+.1%})")
    before, after = run.with_name(run.name + "-before.json"), run.with_name(run.name + "-after.json")
    if before.exists() and after.exists():
        counts = [json.loads(file.read_text(encoding="utf-8")) for file in (before, after)]
        asked, (right_before, right_after) = counts[0]["asked"], (count["right"] for count in counts)
        print(f"right calls:   {right_before} of {asked} held-out questions before, {right_after} after")


if __name__ == "__main__":
    main()
