"""An accelerate launch file becomes a Strategy; what accelerate would misread, ignore or crash on is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from finetune.errors import UserError
from finetune.launch.strategy import PRECISIONS, TARGETS, Precision, Strategy, Target
from finetune.recipe.foreign_keys import SAID_IN_WORDS
from finetune.recipe.strict_yaml import Document, KeyPath, dotted, parse
from finetune.recipe.suggest import closest

# Keys of accelerate 1.15's config (ClusterConfig) whose value may be anything: they do not change what is computed.
INERT = frozenset(
    "debug machine_rank gpu_ids main_process_ip main_process_port rdzv_backend same_network main_training_function "
    "enable_cpu_affinity downcast_bf16 tpu_name tpu_zone tpu_use_cluster tpu_use_sudo command_file commands tpu_vm "
    "tpu_env".split()
)
READ = frozenset(
    "compute_environment distributed_type mixed_precision use_cpu num_processes num_machines deepspeed_config".split()
)
# Ways to train that accelerate or DeepSpeed knows and this project does not; harmless while empty.
UNSUPPORTED = frozenset(
    "fp8_config fsdp_config parallelism_config megatron_lm_config mpirun_config dynamo_config dynamo_backend "
    "deepspeed_config_file zenflow".split()
)
INSTEAD = {  # what to do instead, for two of them
    "deepspeed_config_file": "Write its settings under deepspeed_config; see accelerate_configs/zero3_offload.yaml.",
    "zenflow": SAID_IN_WORDS["zenflow"],
}
DEEPSPEED_KEYS = frozenset(
    "zero_stage offload_optimizer_device offload_param_device offload_optimizer_nvme_path offload_param_nvme_path "
    "gradient_accumulation_steps gradient_clipping zero3_init_flag zero3_save_16bit_model deepspeed_hostfile "
    "deepspeed_exclusion_filter deepspeed_inclusion_filter deepspeed_multinode_launcher "
    "deepspeed_moe_layer_cls_names".split()
)
DISTRIBUTED = ("NO", "MULTI_GPU", "DEEPSPEED")
Choice = TypeVar("Choice", bound=str)
Number = TypeVar("Number", int, float)


class LaunchFile:
    """The values of one launch file, and the problems found so far (`refuse` adds one with its line)."""

    def __init__(self, path: str | os.PathLike[str]):
        self.name = os.fspath(path)
        self.document: Document = parse(_read(self.name), version="1.1")
        self.problems = [(line, f"{self.name}:{line}: {message}") for line, message in self.document.problems]
        self.values: Mapping[str, Any] = self.document.value if isinstance(self.document.value, dict) else {}
        deepspeed = self.values.get("deepspeed_config")
        self.deepspeed: Mapping[str, Any] = deepspeed if isinstance(deepspeed, dict) else {}
        if not self.values and not self.problems:
            raise UserError(f"{self.name}: is not an accelerate launch file; see accelerate_configs/ for examples.")

    def refuse(self, key: str | KeyPath, message: str) -> None:
        """Add a problem with the line of `key`, or of its section."""
        path = (key,) if isinstance(key, str) else key
        lines = self.document.lines
        line = lines.get(path) or lines.get(path[:1]) or 1
        self.problems.append((line, f"{self.name}:{line}: {message}"))

    def choice(self, path: KeyPath, default: Choice, choices: tuple[Choice, ...], advice: str = "") -> Choice:
        """The text at `path`, one of `choices` in any case; otherwise a problem and the default."""
        holder = self.deepspeed if len(path) > 1 else self.values
        value = holder.get(str(path[-1]))
        if value is None and path[-1] not in holder:
            return default
        found = next((c for c in choices if isinstance(value, str) and c.lower() == value.lower()), None)
        if found is None:
            hint = closest(value, choices) if isinstance(value, str) else ""
            self.refuse(path, f"{dotted(path)} is {_show(value)}; it must be {_or(choices)}.{hint}{advice}")
        return found or default

    def count(self, key: str, default: int | None) -> int:
        """The whole number of at least 1 under `key`; otherwise a problem and 1."""
        value = self.values.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        said = f"{key} is {_show(value)}" if key in self.values else f"{key} is missing"
        self.refuse(key, f"{said}; it must be a whole number of at least 1.")
        return 1

    def flag(self, key: str) -> bool:
        """The boolean under `key`, False where it is absent; otherwise a problem and False."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            self.refuse(key, f"{key} is {_show(value)}; it must be true or false, without quotes.")
        return value is True

    def knob(self, key: str, kind: type[Number]) -> Number | None:
        """A number above 0 in deepspeed_config that the recipe may give too; None when absent or `auto`."""
        value = self.deepspeed.get(key)
        if value is None or value == "auto":
            return None
        if isinstance(value, int | kind) and not isinstance(value, bool) and value > 0:
            return kind(value)
        where = ("deepspeed_config", key)
        self.refuse(where, f"{dotted(where)} is {_show(value)}; it must be a number above 0.")
        return None

    def finish(self) -> None:
        """Raises UserError with everything refused so far, in the order of the file."""
        if self.problems:
            raise UserError([message for _, message in sorted(self.problems, key=lambda problem: problem[0])])


def read_launch_file(path: str | os.PathLike[str]) -> Strategy:
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
    if kind != "DEEPSPEED":
        if file.deepspeed:
            file.refuse("deepspeed_config", f"deepspeed_config is ignored with distributed_type {kind}; remove it.")
        file.finish()
        return Strategy(file.name, "ddp" if ranks > 1 else "single", ranks, machines, precision, use_cpu)
    stage = file.deepspeed.get("zero_stage", 2)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        where = ("deepspeed_config", "zero_stage")
        file.refuse(where, f"deepspeed_config.zero_stage is {stage!r}; it must be 1, 2 or 3.")
        stage = 3
    optimizer, param, folder = offload(file, stage)
    steps = file.knob("gradient_accumulation_steps", int)
    clipping = file.knob("gradient_clipping", float)
    file.finish()
    return Strategy(
        file.name, "deepspeed", ranks, machines, precision, use_cpu, stage, optimizer, param, folder, steps, clipping
    )


def _precision(file: LaunchFile) -> Precision:
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


def check_keys(file: LaunchFile) -> None:
    """Refuses keys that accelerate does not know (it stops, or ignores them) and ways to train that we do not have."""
    known = INERT | READ | UNSUPPORTED
    for key, value in file.values.items():
        if key in UNSUPPORTED and value and value not in ("no", "NO", {"dynamo_backend": "NO"}):
            file.refuse(key, _unsupported(key, key))
        elif key in DEEPSPEED_KEYS:
            file.refuse(key, f"{key} belongs under deepspeed_config.")
        elif key == "fp16":
            file.refuse(key, "fp16 is an old key; write mixed_precision: fp16.")
        elif key not in known:
            file.refuse(key, f"{key} is not a key of an accelerate launch file.{closest(key, sorted(known))}")
    section = file.values.get("deepspeed_config")
    if section is not None and not isinstance(section, dict):
        file.refuse("deepspeed_config", f"deepspeed_config is {_show(section)}; it must be a mapping.")
    for key in file.deepspeed:
        if key in UNSUPPORTED:
            file.refuse(("deepspeed_config", key), _unsupported(key, f"deepspeed_config.{key}"))
        elif key not in DEEPSPEED_KEYS:
            place = " It is a key of the top level." if key in known else closest(key, sorted(DEEPSPEED_KEYS))
            # accelerate ignores such a key without a warning
            file.refuse(("deepspeed_config", key), f"deepspeed_config.{key} is not a key that accelerate reads.{place}")


def _unsupported(key: str, shown: str) -> str:
    return f"{shown} is not supported here. {INSTEAD.get(key, 'See accelerate_configs/ for what is.')}"


def check_ranks(file: LaunchFile, kind: str, ranks: int, machines: int, use_cpu: bool) -> None:
    """Refuses the combinations under which accelerate starts another number of ranks than the file says."""
    if kind == "NO" and ranks > 1:
        better = "MULTI_GPU (it also runs CPU ranks, with use_cpu: true)"
        file.refuse("num_processes", f"num_processes is {ranks}, but distributed_type NO starts 1. Use {better}.")
    if kind == "NO" and machines > 1:
        file.refuse("num_machines", f"num_machines is {machines}, but distributed_type NO runs on 1. Use MULTI_GPU.")
    if ranks % machines:
        file.refuse("num_processes", f"num_processes is {ranks} over all machines; {machines} does not divide it.")
    if kind == "DEEPSPEED" and machines > 1 and file.deepspeed.get("deepspeed_multinode_launcher") != "standard":
        why = "accelerate would otherwise start pdsh; write deepspeed_multinode_launcher: standard"
        file.refuse("deepspeed_config", f"num_machines is {machines}: {why} under deepspeed_config.")


def offload(file: LaunchFile, stage: int) -> tuple[Target, Target, str | None]:
    """(optimizer, parameters) offload targets and the NVMe folder, checked against the ZeRO stage."""
    targets: dict[str, Target] = {}
    folders: dict[str, str] = {}
    for what, lowest in (("optimizer", {"cpu": 1, "nvme": 3}), ("param", {"cpu": 3, "nvme": 3})):
        where = ("deepspeed_config", f"offload_{what}_device")
        target = file.choice(where, "none", TARGETS)
        if target != "none" and stage < lowest[target]:
            need = f"ZeRO stage {lowest[target]}{' or higher' if lowest[target] < 3 else ''}"
            file.refuse(where, f"{dotted(where)} is {target}, which needs {need}, not {stage}.")
        if target == "nvme":
            path_key = f"offload_{what}_nvme_path"
            folder = file.deepspeed.get(path_key)
            if isinstance(folder, str) and folder and folder != "none":
                folders[path_key] = folder
            else:
                file.refuse(where, f"{dotted(where)} is nvme; add {path_key}: a folder on that disk.")
        targets[what] = target
    if len(set(folders.values())) > 1:
        said = " and ".join(f"{k} {v}" for k, v in folders.items())
        file.refuse("deepspeed_config", f"{said} differ; give both the same folder.")
    return targets["optimizer"], targets["param"], next(iter(folders.values()), None)


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{name}: no such launch file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as a launch file: {error}.") from None


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _or(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1]
