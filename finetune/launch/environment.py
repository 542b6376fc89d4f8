"""The environment that accelerate or torchrun made for this rank becomes a Strategy. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping

from finetune.errors import UserError
from finetune.launch.config_file import Choice, read_launch_file
from finetune.launch.strategy import PRECISIONS, TARGETS, Kind, Strategy


def is_launched() -> bool:
    """Whether this process was started by accelerate or torchrun as one rank of a launch."""
    # accelerate sets the second for every script; people set other ACCELERATE_* variables, such as the log level,
    # themselves
    return "LOCAL_RANK" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ


def from_environment(environ: Mapping[str, str], config_file: str | os.PathLike[str] | None = None) -> Strategy:
    """The strategy of this launched process, from the variables that accelerate and torchrun set.

    accelerate hands over neither `use_cpu` (with several ranks or DeepSpeed) nor the NVMe folders; they come from
    `config_file`, the file the launcher was given (see launcher_command.py), the folders also from accelerate's own
    ACCELERATE_DEEPSPEED_OFFLOAD_*_NVME_PATH. Raises UserError for what this project does not run.
    """
    file = read_launch_file(config_file) if config_file is not None else None
    launched = "LOCAL_RANK" in environ or any(key.startswith("ACCELERATE_") for key in environ)
    source = file.source if file else "environment" if launched else "one process"
    problems = _refused(environ)
    precision = _choice(environ.get("ACCELERATE_MIXED_PRECISION", "no"), PRECISIONS, "mixed precision", problems)
    use_cpu = bool(file and file.use_cpu) or _true(environ, "ACCELERATE_USE_CPU")
    # some clusters set WORLD_SIZE for programs that no launcher started; accelerate goes by LOCAL_RANK too
    ranks = _count(environ, "WORLD_SIZE", 1) if "LOCAL_RANK" in environ else 1
    machines = max(1, ranks // max(1, _count(environ, "LOCAL_WORLD_SIZE", ranks)))
    deepspeed = _true(environ, "ACCELERATE_USE_DEEPSPEED")
    steps, clipping = _knobs(environ)
    if not deepspeed:
        if problems:
            raise UserError([f"launch: {problem}" for problem in problems])
        kind: Kind = "ddp" if ranks > 1 else "single"
        return Strategy(source, kind, ranks, machines, precision, use_cpu, gradient_accumulation_steps=steps)
    stage = _count(environ, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)
    if stage not in (1, 2, 3):
        problems.append(f"ZeRO stage {stage} is not supported; use 1, 2 or 3.")
    devices = [f"ACCELERATE_DEEPSPEED_OFFLOAD_{w}_DEVICE" for w in ("OPTIMIZER", "PARAM")]
    optimizer, param = (_choice(environ.get(name, "none"), TARGETS, name, problems) for name in devices)
    names = [f"ACCELERATE_DEEPSPEED_OFFLOAD_{w}_NVME_PATH" for w in ("OPTIMIZER", "PARAM")]
    of_file = file.nvme_path if file else None
    folder = next((environ[n] for n in names if environ.get(n, "none") not in ("", "none")), of_file)
    if "nvme" in (optimizer, param) and not folder:
        problems.append(
            "NVMe offload without a folder: accelerate does not pass --offload_*_nvme_path on. Put the folder into a"
            f" launch file (accelerate_configs/zero3_nvme.yaml), or set {names[0]}."
        )
    if problems:
        raise UserError([f"launch: {problem}" for problem in problems])
    return Strategy(
        source, "deepspeed", ranks, machines, precision, use_cpu, stage, optimizer, param, folder, steps, clipping
    )


def _choice(text: str, choices: tuple[Choice, ...], what: str, problems: list[str]) -> Choice:
    """`text` as one of `choices`, in any case; otherwise the first of them, and a problem."""
    found = next((choice for choice in choices if choice == text.lower()), None)
    if found is None:
        problems.append(f"{what} is {text.lower()}; it must be {', '.join(choices[:-1])} or {choices[-1]}.")
    return found or choices[0]


def _refused(environ: Mapping[str, str]) -> list[str]:
    """Ways to train that accelerate was told to use and this project does not have."""
    problems = []
    for variable, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _true(environ, variable):
            problems.append(f"{what} is not supported; for sharded weights use accelerate_configs/zero3.yaml.")
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        problems.append("torch.compile through accelerate (dynamo_backend) is not supported; leave it out.")
    if environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        problems.append("deepspeed_config_file is not supported; write its settings under deepspeed_config.")
    return problems


def _knobs(environ: Mapping[str, str]) -> tuple[int | None, float | None]:
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    clipping = environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    try:
        return (None if steps == "auto" else int(steps)), (None if clipping == "auto" else float(clipping))
    except ValueError:
        said = f"gradient_accumulation_steps {steps} or gradient_clipping {clipping}"
        raise UserError(f"launch: {said} is not a number.") from None


def _true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def _count(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdigit() else default
