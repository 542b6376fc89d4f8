"""The scale check at every start: does this engine, in the versions at hand, add up a window's micro-batches with the
right weight?

Released versions of DeepSpeed lose micro-batches or scale them wrongly and print nothing. So every training starts
with a probe module in an engine of its own with the run's configuration. Its loss is linear and every micro-batch of
every rank has a weight of its own that starts at zero, so after one step of SGD with learning rate 1 each weight
shows the factor that its micro-batch got: a lost one, one that counts twice and a wrong scale all show, whatever the
number of ranks and micro-batches."""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from finetune.engine.engine import Engine
from finetune.engine.settings import EngineSettings
from finetune.engine.start import start_engine
from finetune.errors import UserError
from finetune.launch.strategy import Strategy
from finetune.objectives.micro_batch import MicroBatch
from finetune.report.text import count

MOST_MICRO_BATCHES = 16  # a window of the probe is no longer: milliseconds each
# a feature's size, exact in every precision: small, so that nothing clips and fp16's loss scale overflows nothing
UNIT = 2.0**-10
# Relative error of one weight. bf16 and fp16 round up to four times on the way (scaled loss, gradient, communication,
# average), each by half a unit in the last place. float32: far above its roundings, far below any wrong factor.
TOLERANCE = {"no": 1e-5, "bf16": 4 * 2.0**-8, "fp16": 4 * 2.0**-11}


class _Linear(nn.Module):
    def __init__(self, weights: int):
        super().__init__()
        self.plus, self.minus = nn.Parameter(torch.zeros(weights)), nn.Parameter(torch.zeros(weights))

    def forward(self, features: Tensor) -> Tensor:
        return (self.plus * features - self.minus * features).float().sum()


class Probe(nn.Module):
    """A summed loss like a real run's, in two parameters: each weight's gradient is its feature."""

    def __init__(self, weights: int):
        super().__init__()
        self.model = _Linear(weights)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Summed loss of one micro-batch, scalar."""
        return self.model(inputs["features"])


def tokens_of(rank: int, micro_batch: int, ranks: int, last: bool) -> int:
    """Tokens of the probe's micro-batch, ragged; none in the last rank's last one."""
    empty = last and rank == ranks - 1 and (ranks > 1 or micro_batch > 0)
    return 0 if empty else 1 + (3 * rank + 5 * micro_batch) % 7


def start_probe_engine(settings: EngineSettings, say: Callable[[str], None] = print) -> Engine:
    """An engine like the run's, for `check_scale`."""
    limit = settings.max_grad_norm and max(settings.max_grad_norm, 1.0)  # the clipping code runs, and clips nothing
    return start_engine(replace(settings, max_grad_norm=limit), say)


def check_scale(engine: Engine) -> str:
    """Train the probe for three windows in this engine and release it; returns one line for the plan. A collective.

    The windows have as many micro-batches as configured (at most MOST_MICRO_BATCHES), one, and one more than
    configured. Raises UserError naming the versions when a micro-batch has not exactly the weight that it must have.
    """
    strategy = engine.strategy
    # without what any first start costs: imports, the process group, DeepSpeed's compiles
    started = time.perf_counter()
    full = min(engine.accelerator.gradient_accumulation_steps, MOST_MICRO_BATCHES)
    problem = measure(engine, (full, 1, full + 1))
    engine.release()
    if problem:
        raise UserError(
            f"scale check: {_versions(strategy)} would train wrongly: {problem}."
            " Nothing was trained. Install the versions of constraints.txt."
        )
    return (
        f"ok, windows of {full}, 1 and {full + 1} micro-batches on {count(strategy.ranks, 'rank')}"
        f" under {_versions(strategy)}, {time.perf_counter() - started:.1f} s"
    )


def measure(engine: Engine, windows: tuple[int, ...]) -> str:
    """Run windows of so many micro-batches through the probe; "" when all is exact, else what is wrong. A
    collective.
    """
    ranks = engine.ranks
    wanted: list[float] = []
    norms: list[tuple[float, float]] = []
    probe = Probe(sum(windows) * ranks)
    engine.prepare(probe, torch.optim.SGD(probe.parameters(), lr=1.0))
    for micro_batches in windows:
        counts = [[tokens_of(r, k, ranks, k == micro_batches - 1) for r in range(ranks)] for k in range(micro_batches)]
        total = sum(map(sum, counts))
        norms.append(
            (
                _train(engine, counts, len(wanted), sum(windows) * ranks),
                UNIT * math.sqrt(2 * sum(c * c for row in counts for c in row)) / total,
            )
        )
        wanted += [UNIT * tokens / total for row in counts for tokens in row]
    state = engine.full_state_dict(only_trained=True)
    here = torch.stack([-state["plus"], state["minus"]]).double() if state else torch.zeros(2, len(wanted))
    found = engine.all_reduce_sum(*here.flatten())  # every rank judges, and all come to the same
    return judge(found, wanted * 2, norms, ranks, windows, TOLERANCE[engine.strategy.mixed_precision])


def _train(engine: Engine, counts: list[list[int]], first: int, weights: int) -> float:
    """One window of the probe; returns the engine's gradient norm. `counts` are tokens by micro-batch and rank."""
    mine = [row[engine.rank] for row in counts]
    (denominator,) = engine.all_reduce_sum(sum(mine))
    for _ in range(20):  # fp16's loss scaler may skip a window or two, and takes its time to come down
        for k, tokens in enumerate(mine):
            features = torch.zeros(weights)
            features[first + k * engine.ranks + engine.rank] = tokens * UNIT
            engine.micro_step(MicroBatch({"features": features}, tokens, tokens), denominator, last=k == len(mine) - 1)
        if engine.applied or not engine.scales_loss:
            break
    return engine.grad_norm()


def judge(
    found: list[float],
    wanted: list[float],
    norms: list[tuple[float, float]],
    ranks: int,
    windows: tuple[int, ...],
    tolerance: float,
) -> str:
    """ "" when every weight and every (found, wanted) gradient norm is right; else the factors seen."""
    factors = [f / w for f, w in zip(found, wanted, strict=True) if w]
    stray = [f for f, w in zip(found, wanted, strict=True) if not w and f]
    wrong = [f for f in factors if not abs(f - 1) <= tolerance]  # NaN is wrong too
    norm = max((f / w for f, w in norms), key=lambda ratio: abs(ratio - 1) if math.isfinite(ratio) else math.inf)
    if not wrong and not stray and abs(norm - 1) <= 2 * tolerance:
        return ""
    total = len(factors) // 2
    said = [f"in windows of {', '.join(map(str, windows))} micro-batches on {count(ranks, 'rank')}"]
    if wrong:
        low, high = min(wrong), max(wrong)
        seen = f"{(low + high) / 2:.3g}" if math.isclose(low, high, rel_tol=1e-2) else f"{low:.3g} to {high:.3g}"
        said.append(f"{math.ceil(len(wrong) / 2)} of {total} micro-batches count {seen} times what they must")
        lost = sum(f == 0 for f in wrong)
        said += [f"{math.ceil(lost / 2)} of them are lost"] if lost else []
    if stray:
        said.append("an empty micro-batch changed weights")
    return ", ".join([*said, f"the gradient norm is {norm:.4g} times the true one"])


def _versions(strategy: Strategy) -> str:
    names = ["accelerate", "torch"] + ["deepspeed"] * (strategy.engine == "deepspeed")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
