"""On which hardware: a launch file, or the environment that a launcher made, becomes one `Strategy`. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.errors import UserError
from finetune.launch.config_file import DISTRIBUTED, PRECISIONS, LaunchFile, check_keys, check_ranks, offload
from finetune.launch.launcher_command import default_config_file, is_launcher, requested, uses_default_config
from finetune.recipe.load import Loaded

__all__ = [
    "Strategy",
    "asked",
    "default_config_file",
    "from_environment",
    "is_launcher",
    "merge_knobs",
    "one_process",
    "read",
    "requested",
]

Target = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Strategy:
    """How a run is laid out over hardware: nothing here changes the resulting weights."""

    source: str  # the launch file's path, "environment" or "one process"
    engine: Literal["single", "ddp", "deepspeed"]
    ranks: int  # over all machines
    machines: int
    mixed_precision: Literal["no", "bf16", "fp16"]
    use_cpu: bool  # True: asked for the CPU; False: whatever device is there
    zero_stage: int = 0  # 0 without DeepSpeed
    offload_optimizer: Target = "none"
    offload_param: Target = "none"
    nvme_path: str | None = None
    gradient_accumulation_steps: int | None = None  # None: not given, or auto
    gradient_clipping: float | None = None  # the same


def one_process(mixed_precision: str = "no", use_cpu: bool = False) -> Strategy:
    """The strategy of a plain `python finetune/train.py`."""
    return Strategy("one process", "single", 1, 1, mixed_precision, use_cpu)


def read(path: str | os.PathLike[str]) -> Strategy:
    """What `accelerate launch --config_file path` would start.

    Raises UserError with every problem and its line: unknown keys, an unquoted `mixed_precision: no`, ranks that would
    not start, offload that the ZeRO stage does not have.
    """
    file = LaunchFile(path)
    check_keys(file)
    if file.values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        file.refuse("compute_environment", "compute_environment must be LOCAL_MACHINE.")
    precision = _precision(file)
    use_cpu = file.flag("use_cpu")
    kind = _kind(file)
    ranks = file.count("num_processes", 1 if kind == "NO" else None)
    machines = file.count("num_machines", 1)
    check_ranks(file, kind, ranks, machines, use_cpu)
    if precision == "fp16" and use_cpu:
        file.refuse("mixed_precision", f"mixed_precision is fp16, but {_NO_SCALER}")
    if kind != "DEEPSPEED":
        if file.deepspeed:
            file.refuse("deepspeed_config", f"deepspeed_config is ignored with distributed_type {kind}; remove it.")
        file.finish()
        engine = "ddp" if ranks > 1 else "single"
        return Strategy(file.name, engine, ranks, machines, precision, use_cpu)
    stage = file.deepspeed.get("zero_stage", 2)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        where = ("deepspeed_config", "zero_stage")
        file.refuse(where, f"deepspeed_config.zero_stage is {stage!r}; it must be 1, 2 or 3.")
        stage = 3
    optimizer, param, folder = offload(file, stage)
    steps = file.knob("gradient_accumulation_steps", (int,))
    clipping = file.knob("gradient_clipping", (int, float))
    file.finish()
    return Strategy(
        file.name, "deepspeed", ranks, machines, precision, use_cpu, stage, optimizer, param, folder, steps, clipping
    )


NO_LOSS_SCALER = "fp16 needs a loss scaler, which does not run on the CPU"
_NO_SCALER = f"{NO_LOSS_SCALER}. Use bf16, or 'no' with quotes."


def _precision(file: LaunchFile) -> str:
    if file.values.get("mixed_precision") is False:
        # YAML 1.1 reads an unquoted no as False, and accelerate crashes on it
        file.refuse("mixed_precision", "mixed_precision: no is read as false; write 'no' with quotes.")
        return "no"
    if file.values.get("mixed_precision") is None:
        return "no"
    return file.choice(("mixed_precision",), "no", PRECISIONS)


def _kind(file: LaunchFile) -> str:
    """The file's distributed_type; the types that start one rank whatever num_processes says get their own advice."""
    kind = file.values.get("distributed_type")
    if kind == "MULTI_CPU":
        better = "MULTI_GPU with use_cpu: true, as accelerate_configs/cpu_2_ranks.yaml does"
        file.refuse("distributed_type", f"distributed_type MULTI_CPU starts one process, always. Use {better}.")
        return "MULTI_GPU"
    if kind is False:  # YAML 1.1 again
        file.refuse("distributed_type", "distributed_type: NO is read as false; write 'NO' with quotes.")
        return "NO"
    if "distributed_type" not in file.values:
        file.refuse("distributed_type", f"distributed_type is missing; it must be {', '.join(DISTRIBUTED)}.")
        return "NO"
    return file.choice(("distributed_type",), "MULTI_GPU", DISTRIBUTED, " See accelerate_configs/ for examples.")


def from_environment(environ: Mapping[str, str], config_file: str | os.PathLike[str] | None = None) -> Strategy:
    """The strategy of this launched process, from the variables that accelerate and torchrun set.

    accelerate hands over neither `use_cpu` (with several ranks or DeepSpeed) nor the NVMe folders; they come from
    `config_file`, the file the launcher was given (see `asked`), the folders also from accelerate's own
    ACCELERATE_DEEPSPEED_OFFLOAD_*_NVME_PATH. Raises UserError for what this project does not run.
    """
    file = read(config_file) if config_file is not None else None
    launched = "LOCAL_RANK" in environ or any(key.startswith("ACCELERATE_") for key in environ)
    source = file.source if file else "environment" if launched else "one process"
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    use_cpu = bool(file and file.use_cpu) or _true(environ, "ACCELERATE_USE_CPU")
    problems = _refused(environ)
    if precision not in PRECISIONS:
        problems.append(f"mixed precision is {precision}; it must be no, bf16 or fp16.")
    if precision == "fp16" and use_cpu:
        problems.append(f"mixed precision is fp16, but {_NO_SCALER}")
    # some clusters set WORLD_SIZE for programs that no launcher started; accelerate goes by LOCAL_RANK too
    ranks = _count(environ, "WORLD_SIZE", 1) if "LOCAL_RANK" in environ else 1
    machines = max(1, ranks // max(1, _count(environ, "LOCAL_WORLD_SIZE", ranks)))
    deepspeed = _true(environ, "ACCELERATE_USE_DEEPSPEED")
    steps, clipping = _knobs(environ)
    if not deepspeed:
        if problems:
            raise UserError([f"launch: {problem}" for problem in problems])
        engine = "ddp" if ranks > 1 else "single"
        return Strategy(source, engine, ranks, machines, precision, use_cpu, gradient_accumulation_steps=steps)
    stage = _count(environ, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)
    if stage not in (1, 2, 3):
        problems.append(f"ZeRO stage {stage} is not supported; use 1, 2 or 3.")
    optimizer, param = (environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{w}_DEVICE", "none") for w in ("OPTIMIZER", "PARAM"))
    names = [f"ACCELERATE_DEEPSPEED_OFFLOAD_{w}_NVME_PATH" for w in ("OPTIMIZER", "PARAM")]
    folder = next((environ[n] for n in names if environ.get(n, "none") not in ("", "none")), file and file.nvme_path)
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


def asked(parents: Sequence[tuple[Sequence[str], str]], environ: Mapping[str, str]) -> tuple[int | None, str | None]:
    """(ranks, launch file) that the nearest launcher among `parents` was asked for; None for what nobody said.

    `parents` are the parent processes, nearest first, each as (command line, working directory). Raises UserError for
    a launch file that accelerate would misread, for instance one that starts fewer ranks than it says.
    """
    for argv, folder in parents:
        if is_launcher(argv):
            ranks, config_file = requested(argv, environ)
            if config_file is not None:
                config_file = os.path.join(folder, config_file)
            elif uses_default_config(argv):
                config_file = default_config_file(environ)
            if ranks is None and config_file is not None:
                ranks = read(config_file).ranks
            return ranks, config_file
    return requested((), environ)


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


def merge_knobs(loaded: Loaded, strategy: Strategy) -> tuple[int | Literal["auto"], float]:
    """(gradient_accumulation_steps, max_grad_norm) after the one-owner rule.

    The launch configuration fills what the recipe leaves open (`auto`, or a max_grad_norm it does not give). Raises
    UserError naming both values where both give one and they differ.
    """
    training = loaded.recipe.training
    ours = {key: getattr(training, key) for key in ("gradient_accumulation_steps", "max_grad_norm")}
    theirs = {
        "gradient_accumulation_steps": ("gradient_accumulation_steps", strategy.gradient_accumulation_steps),
        "max_grad_norm": ("gradient_clipping", strategy.gradient_clipping),
    }
    problems = []
    for key, (name, value) in theirs.items():
        full = f"training.{key}"
        if value is None:
            continue
        if ours[key] == "auto" or not loaded.is_set(full):
            ours[key] = value
        elif ours[key] != value:
            problems.append(
                f"{loaded.where(full)}: {full} is {ours[key]:g}, but the launch configuration ({strategy.source}) says"
                f" {name} {value:g}. The recipe owns it: remove it from the launch configuration, or make them equal."
            )
    if problems:
        raise UserError(problems)
    return ours["gradient_accumulation_steps"], ours["max_grad_norm"]
