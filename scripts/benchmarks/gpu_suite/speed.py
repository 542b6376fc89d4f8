"""Throughput cases of scripts/benchmarks/gpu_suite/run.py: tokens per second and MFU by K, with one micro-batch
size.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from scripts.benchmarks.gpu_suite.setup import Setup, launched
from tests.support.launch import launch_file

CLAIMS = ("-m", "scripts.benchmarks.accumulation")
STEPS = {True: (1, 2, 4), False: (1, 8, 64)}  # K, by --cpu-small
NATIVE_RATIO = 0.97  # at least, tokens/s at K = 8 over K = 1 without offload; with it, more than 1
# Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets of the H100, H200 and A100; by a part of the device's
# name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def measure(setup: Setup, folder: Path, layout: dict) -> dict:
    """Windows of K micro-batches, timed inside one launch (accumulation_claims.timed_windows), AdamW, no
    checkpointing.
    """
    prepared, sizes = setup.prepared("prepare models"), setup.sizes["small"]
    timing = {"sizes": sizes, "steps": STEPS[setup.small], "rows": setup.rows, "tokens": setup.tokens, "repeats": 2}
    config, out = launch_file(folder / "launch.yaml", **setup.launch | layout), folder / "times.json"
    launched(config, *CLAIMS, "--timed-windows", out, "--timing", json.dumps(timing), threads=setup.threads)
    peak = peak_flops(prepared["device"])
    found, base = [], None
    for window in json.loads(out.read_text()):
        seconds = statistics.median(window["window_seconds"])
        tokens_per_second = window["K"] * setup.rows * setup.tokens / seconds
        base = base or tokens_per_second
        flops = flops_per_token(window["parameters"], sizes, setup.tokens)
        found.append(
            {
                "K": window["K"],
                "window_seconds": seconds,
                "tokens_per_second": tokens_per_second,
                "over_first": tokens_per_second / base,
                "mfu": tokens_per_second * flops / peak if peak else None,
            }
        )
    least = None if setup.small else 1.0 if layout else NATIVE_RATIO  # on a CPU host and device are one: no limit
    return {
        "parameters": window["parameters"],
        "micro_batch": [setup.rows, setup.tokens],
        "flops_per_token": flops,
        "peak_flops": peak,
        "least_over_first": least,
        "windows": found,
    }


def flops_per_token(parameters: int, sizes: dict, tokens: int) -> float:
    """6 N + 12 L H Q T, forward and backward: N parameters (the tied embedding once, as the head), L layers, H heads of
    size Q, rows of T tokens. PaLM (arXiv 2204.02311), appendix B; the attention term counts all pairs, also those that
    a causal mask leaves out."""
    return (
        6.0 * parameters + 12.0 * sizes["num_hidden_layers"] * sizes["num_attention_heads"] * sizes["head_dim"] * tokens
    )


def peak_flops(device: str) -> float | None:
    """Of a device by its name; None for one that the table does not know."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
