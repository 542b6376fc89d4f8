"""Memory cases of scripts/benchmarks/gpu_suite/run.py: the real trainer for a few steps, what it predicted and what it
took; fitted overheads.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import threading
from pathlib import Path

import yaml

from scripts.benchmarks.gpu_suite.setup import Setup, build_op, launched
from scripts.quickstart.tiny_model import TEXT
from tests.support.launch import TRAIN, launch_file

STEPS = 3  # the optimizer's state exists from the second on
LIMITS = {"native": 0.05, "sharded": 0.10}  # of the device's predicted peak, on a GPU
MISSING = "run.json has no memory section: peaks from its summary, nothing predicted"


def measure(
    setup: Setup,
    folder: Path,
    layout: dict | None = None,
    overrides: dict | None = None,
    steps: int = 1,
    model: str = "small",
) -> dict:
    """`accelerate launch finetune/train.py` on rows of full length; `steps` micro-batches per optimizer step.

    Raises NotRun where the op of NVMe offload does not build, RuntimeError with the trainer's last words when it fails.
    """
    parameters = setup.prepared("prepare models")["parameters"][setup.model(model).name]
    options = setup.launch | (layout or {})
    if "nvme" in options.values():
        build_op(setup, "async_io")
        setup.disk.mkdir(exist_ok=True)
        options |= {f"offload_{what}_nvme_path": str(setup.disk) for what in ("optimizer", "param")}
    config, recipe = (
        launch_file(folder / "launch.yaml", **options),
        write_recipe(setup, folder, setup.model(model), steps),
    )
    given = [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]
    with DeviceWatch() as watch:
        launched(config, TRAIN, recipe, *given, threads=setup.threads)
    run = json.loads((folder / "run" / "run.json").read_text())
    kind = "sharded" if options.get("zero_stage", 0) else "native"
    return figures(run, watch) | {"parameters": parameters, "K": steps, "limit": None if setup.small else LIMITS[kind]}


def write_recipe(setup: Setup, folder: Path, model: Path, steps: int) -> Path:
    """Plain text cut into rows of exactly max_length tokens."""
    recipe = {
        "model": {"name_or_path": str(model)},
        "data": {"train": [{"path": str(TEXT)}], "max_length": setup.tokens, "loss_on": "all"},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": setup.rows,
            "global_batch_size": setup.rows * steps,
        },
        "checkpoint": {"save_steps": 1000},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


class DeviceWatch:
    """What the device itself says is in use, sampled while a case has it alone: the rise, `rise_bytes`; None without
    nvidia-smi.
    """

    QUERY = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0")

    def __enter__(self) -> DeviceWatch:
        self.before = self.peak = self._used()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        if self.before is not None:
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(0.1):
            self.peak = max(self.peak, self._used() or 0)

    def _used(self) -> int | None:
        try:
            said = subprocess.run(self.QUERY, capture_output=True, text=True).stdout.strip()
        except OSError:
            return None
        return int(said) * 2**20 if said.isdigit() else None

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self.before is not None:
            self._thread.join()
        self.rise_bytes = None if self.before is None else self.peak - self.before


def figures(run: dict, watch: DeviceWatch) -> dict:
    """Peaks, prediction and error of a finished run, from its run.json; what is not there is None, and `note` says
    so.
    """
    memory, summary = run.get("memory") or {}, run["summary"]
    predicted, measured, error = (memory.get(key) or {} for key in ("predicted", "measured", "error"))

    def expected(place: str) -> int | None:
        return (predicted.get(place) or {}).get("expected")

    return {
        "device_allocated_bytes": measured.get("device_peak_bytes", summary["device_peak_bytes"]) or None,
        "device_reserved_bytes": measured.get("device_reserved_bytes") or None,
        "device_used_bytes": watch.rise_bytes,
        "host_resident_bytes": measured.get("host_peak_bytes", summary["host_peak_bytes"]),
        "tracked_bytes": measured.get("tracked_peak_bytes") or None,
        "predicted_device_bytes": expected("device") or None,
        "predicted_tracked_bytes": predicted.get("step_bytes") if measured.get("tracked_peak_bytes") else None,
        "predicted_host_tensors_bytes": expected("host"),
        "predicted_host_bytes": expected("host_process"),
        "device_error": error.get("device"),
        "tracked_error": error.get("tracked"),
        "host_error": error.get("host"),
        "peak": predicted.get("peak"),
        "traced": predicted.get("traced"),
        "micro_batch": measured.get("micro_batch", predicted.get("micro_batch")),
        "memory": memory or None,
        "note": "" if memory else MISSING,
    }


# What libraries take beyond the tensors of a run: more, less.
OVERHEADS = {
    "device: reserved over allocated": ("device_reserved_bytes", "device_allocated_bytes"),
    "device: in use over reserved (context, libraries)": ("device_used_bytes", "device_reserved_bytes"),
    "host: resident over tracked tensors": ("host_resident_bytes", "tracked_bytes"),
    "host: resident over predicted tensors": ("host_resident_bytes", "predicted_host_tensors_bytes"),
}


def overheads(found: dict[str, dict]) -> list[dict]:
    """Each of OVERHEADS as one constant, the median over every other case, and how far the rest is from it; `found` are
    the figures of the memory cases by name. None and no residuals where fewer than two cases have both figures."""
    rows = []
    for name, (more, less) in OVERHEADS.items():
        seen = [(case, f[more] - f[less]) for case, f in found.items() if f[more] is not None and f[less] is not None]
        fitted, tested = seen[::2], seen[1::2]
        constant = round(statistics.median(value for _, value in fitted)) if tested else None
        residuals = {case: value - constant for case, value in tested}
        rows.append(
            {
                "name": name,
                "constant_bytes": constant,
                "fitted_on": [case for case, _ in fitted] if tested else [],
                "residual_bytes": residuals,
                "worst_bytes": max(map(abs, residuals.values()), default=None),
            }
        )
    return rows
