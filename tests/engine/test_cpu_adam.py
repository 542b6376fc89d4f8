"""DeepSpeed's CPU Adam, as offloading uses it, takes torch's steps: its own bias correction is 7e-6 off in float32."""

from __future__ import annotations

import pytest
import torch

from finetune.engine.deepspeed.cpu_adam import cpu_adam

pytestmark = pytest.mark.slow  # the first use on a machine compiles the op

STEPS, ELEMENTS = 30, 10_000


def gradients(seed: int) -> list[torch.Tensor]:
    """One gradient per step, of sizes over several orders of magnitude."""
    random = torch.Generator().manual_seed(seed)
    scale = 10 ** (-6 * torch.rand(ELEMENTS, generator=random, dtype=torch.float64))
    return [torch.randn(ELEMENTS, generator=random, dtype=torch.float64) * scale for _ in range(STEPS)]


def trajectory(make, dtype: torch.dtype, start: float, **settings) -> list[torch.Tensor]:
    """The parameter after every step. Its learning rate changes from step to step, as the schedule's does."""
    parameter = torch.nn.Parameter(torch.full((ELEMENTS,), start, dtype=dtype))
    optimizer = make([{"params": [parameter]}], lr=1e-3, **settings)
    found = []
    for i, gradient in enumerate(gradients(seed=0)):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - i / STEPS)
        before = dict(optimizer.param_groups[0])
        parameter.grad = gradient.to(dtype)
        optimizer.step()
        assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
            k: v for k, v in before.items() if k != "params"
        }, "a step leaves the settings as they were"
        found.append(parameter.detach().double().clone())
    return found


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
@pytest.mark.parametrize("start, decay", [(0.0, 0.0), (0.01, 0.1)])
def test_every_step_equals_torch_in_double(betas, start, decay):
    settings = dict(betas=betas, eps=1e-6, weight_decay=decay)
    found = trajectory(cpu_adam, torch.float32, start, **settings)
    wanted = trajectory(torch.optim.AdamW, torch.float64, start, **settings)
    errors = [float((f - w).norm() / (w - start).norm()) for f, w in zip(found, wanted, strict=True)]
    assert max(errors) < 1e-6, errors
