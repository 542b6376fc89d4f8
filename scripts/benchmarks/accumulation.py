#!/usr/bin/env python3
"""Measure what gradient accumulation does and does not do, on this machine, for docs/gradient_accumulation.md.

    python -m scripts.benchmarks.accumulation [--out docs/benchmarks] [--only memory,raggedness,chats,loops,time]

Writes OUT/accumulation.json; scripts/benchmarks/accumulation_plots.py draws it and writes the tables. On the CPU, in
float32, with random models made on the spot. `time` starts one and two ranks by accelerate launch, plainly and with
ZeRO-3 and CPU offload."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from finetune.data.collate import padded
from finetune.data.token_cache import TokenRow
from finetune.engine.libraries import prepare_libraries
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import launched_by
from finetune.launch.start import free_port
from finetune.launch.strategy import one_process
from finetune.objectives.micro_batch import MicroBatch
from finetune.objectives.sft import SummedLoss, sft_loss

REPOSITORY = Path(__file__).resolve().parents[2]

VOCABULARY = 4096
# 1.8M
SMALL = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
MIDDLE = dict(
    hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4
)  # 21M


def make_model(sizes: dict, seed: int = 0) -> torch.nn.Module:
    """A random Llama with tied embeddings; `sizes` are its config's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(**{"vocab_size": VOCABULARY, "tie_word_embeddings": True, "pad_token_id": 0} | sizes)
    )


def make_rows(random: np.random.Generator, lengths: list[int], trained: list[int]) -> list[TokenRow]:
    """Rows of random tokens; each trains its last `trained` tokens."""
    rows = []
    for length, count in zip(lengths, trained, strict=True):
        ids = random.integers(1, VOCABULARY, length)
        rows.append(TokenRow(ids, np.where(np.arange(length) >= length - count, ids, -100)))
    return rows


def make_batch(random: np.random.Generator, lengths: list[int], trained: list[int]) -> MicroBatch:
    """A padded micro-batch of such rows."""
    return padded(make_rows(random, lengths, trained), 0)


def memory(rows: int = 8, tokens: int = 512) -> list[dict]:
    """Bytes by item at the peak of one optimizer step, for the same rows cut into K micro-batches, and for less
    rows.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    found = []
    for checkpointing in (False, True):
        for name, per_micro_batch, steps in (
            ("one batch", rows, 1),
            ("K = 2", rows // 2, 2),
            ("K = 8", rows // 8, 8),
            ("1/8 of the rows", rows // 8, 1),
        ):
            model = make_model(MIDDLE)
            if checkpointing:
                model.gradient_checkpointing_enable()
            engine = start_engine(EngineSettings(one_process(use_cpu=True), steps, per_micro_batch, 1.0))
            engine.prepare(SummedLoss(model.train()), torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False))
            tracker = MemTracker()
            tracker.track_external(model, engine.optimizer.optimizer)
            batch = make_batch(np.random.default_rng(0), [tokens] * per_micro_batch, [tokens - 1] * per_micro_batch)
            # the optimizer's state exists from the second step on; entering forgets the first one's peak
            for _ in range(2):
                with tracker:
                    for k in range(steps):
                        engine.micro_step(batch, float(steps * batch.trained_tokens), last=k == steps - 1)
                        tracker.reset_mod_stats()
            peak = {
                getattr(kind, "value", kind): size
                for kind, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()
            }
            engine.release()
            found.append(
                {
                    "name": name,
                    "checkpointing": checkpointing,
                    "rows_per_step": per_micro_batch * steps,
                    "K": steps,
                    "parameters": model.num_parameters(),
                    "bytes": peak,
                }
            )
            print(found[-1], flush=True)
    return found


def gradient(model: torch.nn.Module) -> Tensor:
    """The accumulated gradient as one float64 vector; cleared."""
    vector = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    model.zero_grad()
    return vector


def accumulated(model, batches: list[MicroBatch], divisors: list[float]) -> Tensor:
    """Gradient of the sum of each micro-batch's summed loss over its divisor."""
    for batch, divisor in zip(batches, divisors, strict=True):
        (sft_loss(model, **batch.inputs) / divisor).backward()
    return gradient(model)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 difference."""
    return float((found - wanted).norm() / wanted.norm())


def ragged_window(
    random: np.random.Generator, spread: float, steps: int = 8, rows: int = 2, mean: int = 24
) -> list[list[TokenRow]]:
    """The rows of K micro-batches, with lognormal trained tokens with this coefficient of variation (std over mean)."""
    sigma = float(np.sqrt(np.log1p(spread**2)))
    counts = np.clip(np.rint(mean * random.lognormal(-(sigma**2) / 2, sigma, (steps, rows))), 1, 300).astype(int)
    return [make_rows(random, [4 + int(n) for n in row], [int(n) for n in row]) for row in counts]


def raggedness() -> list[dict]:
    """Error of the mean of means, and of the window's denominator, against the one big batch, by raggedness."""
    found, model = [], make_model(SMALL)
    for spread in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0):
        errors: dict[str, list[float]] = {"mean of means": [], "window denominator": []}
        for seed in range(5):
            window = ragged_window(np.random.default_rng(seed), spread)
            batches = [padded(rows, 0) for rows in window]
            tokens = [batch.trained_tokens for batch in batches]
            whole = padded([row for rows in window for row in rows], 0)
            wanted = accumulated(model, [whole], [sum(tokens)])
            errors["mean of means"].append(
                difference(accumulated(model, batches, [len(batches) * t for t in tokens]), wanted)
            )
            errors["window denominator"].append(
                difference(accumulated(model, batches, [sum(tokens)] * len(batches)), wanted)
            )
        found.append({"spread": spread, **errors})
        print(found[-1], flush=True)
    return found


def chats() -> dict:
    """The same error on the quick start's chats, as its recipe cuts them into windows; an untrained model of its
    shape.
    """
    from finetune.batching.layout import split_into_micro_batches
    from finetune.batching.windows import Position, next_window
    from finetune.model.load import load_model
    from finetune.recipe.load import load_recipe
    from finetune.training.job import prepare

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        subprocess.run(
            [sys.executable, "-m", "scripts.quickstart.tiny_model", "--output", base, "--untrained-only"], check=True
        )
        loaded = load_recipe(
            REPOSITORY / "recipes/quickstart/sft.yaml", [f"model.name_or_path={base}-init", "data.packing=false"]
        )
        plan = prepare(loaded, one_process(use_cpu=True), print)
        network = load_model(loaded, plan.strategy, plan.facts, torch.device("cpu"))
        errors, counts, position = [], [], Position()
        for _ in range(20):
            window = next_window(position, len(plan.data.train), plan.batch.global_batch_rows, 42)
            position = position.after(window, True)
            parts = split_into_micro_batches(window.rows, 1, plan.batch.per_device_rows)[0]
            batches = [padded([plan.data.train.row(i) for i in part], 0) for part in parts]
            tokens = [batch.trained_tokens for batch in batches]
            counts += [int(plan.data.train.trained[i]) for i in window.rows]
            wanted = accumulated(network, batches, [sum(tokens)] * len(batches))
            errors.append(difference(accumulated(network, batches, [len(batches) * t for t in tokens]), wanted))
    found = {"mean of means": errors, "spread": statistics.stdev(counts) / statistics.mean(counts), "K": len(parts)}
    print(found, flush=True)
    return found


def loops() -> dict:
    """What wrong loops do to the gradient of an even window of 4 micro-batches: relative difference from the one
    batch.
    """
    model, random = make_model(SMALL), np.random.default_rng(1)
    batches = [make_batch(random, [32] * 2, [31] * 2) for _ in range(4)]
    tokens = sum(batch.trained_tokens for batch in batches)
    wanted = accumulated(model, batches, [tokens] * 4)
    for batch in batches:  # zero_grad at the top of the loop's body, step behind the loop
        model.zero_grad()
        (sft_loss(model, **batch.inputs) / tokens).backward()
    zeroed = difference(gradient(model), wanted)
    undivided = difference(accumulated(model, batches, [tokens / 4] * 4), wanted)
    return {"gradients zeroed in every micro-batch": zeroed, "loss not divided by K": undivided}


@dataclass(frozen=True)
class Timing:
    """What `timed_windows` times: windows of K micro-batches of `rows` rows of `tokens` tokens, `repeats` times
    each.
    """

    sizes: dict = field(default_factory=lambda: MIDDLE)
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    rows: int = 1
    tokens: int = 256
    repeats: int = 3


def timed_windows(out: Path, timing: Timing) -> None:
    """Inside a launch: seconds per window for several K with one micro-batch size, interleaved; rank 0 writes `out`."""
    prepare_libraries()
    strategy = from_environment(os.environ, launched_by()[1])
    engine = start_engine(
        EngineSettings(strategy, max(timing.steps), timing.rows, 1.0), lambda line: print(line, file=sys.stderr)
    )
    from finetune.engine.optimizer import build_optimizer
    from finetune.recipe.fields import TrainingSection

    model = make_model(timing.sizes)
    parameters = model.num_parameters()
    settings = TrainingSection(learning_rate=1e-4)
    engine.prepare(
        SummedLoss(model),
        build_optimizer([{"params": list(model.parameters()), "weight_decay": 0.0}], settings, strategy),
    )
    batch = make_batch(
        np.random.default_rng(engine.rank), [timing.tokens] * timing.rows, [timing.tokens - 1] * timing.rows
    )
    trained = timing.rows * (timing.tokens - 1)
    seconds: dict[int, list[float]] = {k: [] for k in timing.steps}
    for repeat in range(1 + timing.repeats):
        for steps in timing.steps if repeat else timing.steps[:2]:  # the first round allocates
            _wait(engine)
            started = time.perf_counter()
            for k in range(steps):
                engine.micro_step(batch, float(steps * engine.ranks * trained), last=k == steps - 1)
            _wait(engine)
            if repeat:
                seconds[steps].append(time.perf_counter() - started)
    if engine.rank == 0:
        done = [
            {
                "K": k,
                "tokens_per_second": k * engine.ranks * trained / statistics.median(t),
                "window_seconds": t,
                "parameters": parameters,
            }
            for k, t in seconds.items()
        ]
        out.write_text(json.dumps(done))
    engine.close()


def _wait(engine) -> None:
    """Until every rank is here and its device has nothing left to do."""
    engine.barrier()
    if engine.device.type != "cpu":
        torch.accelerator.synchronize()


def throughput() -> dict[str, list[dict]]:
    """Trained tokens per second by K, plain and under ZeRO-3 with CPU offload, on one rank and on two."""
    found = {}
    for name, file, ranks in (
        ("one process", "cpu", 1),
        ("ZeRO-3 + CPU offload, 1 rank", "zero3_offload_cpu_2_ranks", 1),
        ("DDP, 2 ranks", "cpu_2_ranks", 2),
        ("ZeRO-3 + CPU offload, 2 ranks", "zero3_offload_cpu_2_ranks", 2),
    ):
        with tempfile.TemporaryDirectory() as folder:
            out, config = Path(folder) / "times.json", Path(folder) / "launch.yaml"
            shipped = yaml.safe_load((REPOSITORY / f"accelerate_configs/{file}.yaml").read_text())
            config.write_text(yaml.safe_dump(shipped | {"num_processes": ranks}))
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "accelerate.commands.launch",
                    "--config_file",
                    config,
                    "--main_process_port",
                    str(free_port()),
                    __file__,
                    "--timed-windows",
                    out,
                ],
                check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            found[name] = json.loads(out.read_text())
        print(name, found[name], flush=True)
    return found


PARTS = {"memory": memory, "raggedness": raggedness, "chats": chats, "loops": loops, "time": throughput}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "benchmarks")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure again; the others are kept")
    parser.add_argument("--timed-windows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--timing", type=json.loads, default={}, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.timed_windows:
        return timed_windows(arguments.timed_windows, Timing(**arguments.timing))
    file = arguments.out / "accumulation.json"
    document = json.loads(file.read_text()) if file.exists() else {}
    for part in arguments.only.split(","):
        document[part] = PARTS[part]()
        document.setdefault("measured", {})[part] = date.today().isoformat()
    document["versions"] = {
        p: importlib.metadata.version(p) for p in ("torch", "transformers", "accelerate", "deepspeed")
    }
    document["machine"] = f"{len(os.sched_getaffinity(0))} CPU cores, no GPU"
    arguments.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
