"""What a launcher was asked for, read from its command line: accelerate may start fewer ranks without a warning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from finetune.errors import UserError
from finetune.launch.config_file import read_launch_file
from finetune.launch.strategy import Strategy

REQUESTED_VARIABLE = "FINETUNE_REQUESTED_PROCESSES"
GENERATIONS = 4  # launcher -> agent -> shell -> rank is the longest chain seen
HOW_TO_START_RANKS = (
    "`accelerate launch --cpu` starts one process whatever --num_processes says. For two ranks on the CPU use"
    " --config_file accelerate_configs/cpu_2_ranks.yaml, or `python -m torch.distributed.run --nproc_per_node 2`; for"
    " GPUs accelerate_configs/multi_gpu.yaml."
)

# Options without a value: everything else that starts with a dash takes the next argument, unless written --key=value.
_FLAGS = frozenset(
    # accelerate launch
    "h help q quiet cpu multi_gpu tpu use_deepspeed use_fsdp use_parallelism_config use_megatron_lm same_network m "
    "module no_python tpu_cluster no_tpu_cluster tpu_use_sudo downcast_bf16 enable_cpu_affinity debug "
    "dynamo_use_fullgraph dynamo_use_dynamic dynamo_use_regional_compilation fp8_use_autocast_during_eval "
    # torch.distributed.run
    "standalone run_path virtual_local_rank".split()
)
_ACCELERATE_SCRIPTS = frozenset({"accelerate-launch", "accelerate-launch.exe"})
_ACCELERATE_MODULES = frozenset({"accelerate.commands.launch", "finetune.launch.accelerate_launch"})
_TORCH_SCRIPTS = frozenset({"torchrun", "torchrun.exe"})
_TORCH_MODULES = frozenset({"torch.distributed.run", "torch.distributed.launch"})


def launched_by() -> tuple[int | None, str | None]:
    """(ranks asked for, launch file), each None when nobody said: from the nearest parent that is a launcher.

    accelerate starts one process for `--cpu --num_processes 2` without a warning; only its command line tells.
    """
    parents, process = [], psutil.Process()
    for _ in range(GENERATIONS):
        try:
            parent = process.parent()
            if parent is None:
                break
            parents.append((parent.cmdline(), parent.cwd()))
            process = parent
        except psutil.Error:
            break
    return asked(parents, os.environ)


def check_ranks_asked_for(strategy: Strategy, ranks_asked: int | None) -> None:
    """Raises UserError when the launcher started another number of ranks than it was asked for."""
    if ranks_asked not in (None, strategy.ranks):
        found = "one process was" if strategy.ranks == 1 else f"{strategy.ranks} processes were"
        raise UserError(f"launch: {ranks_asked} processes were asked for, but {found} started. {HOW_TO_START_RANKS}")


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
                ranks = read_launch_file(config_file).ranks
            return ranks, config_file
    return requested((), environ)


def is_launcher(argv: Sequence[str]) -> bool:
    """Whether this command line is that of `accelerate launch` or torchrun, in any of their spellings."""
    return _split(argv) is not None


def requested(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> tuple[int | None, str | None]:
    """(ranks over all machines, config file) that the launcher with command line `argv` was asked for.

    Either is None when the command line does not say; `accelerate launch` then takes the ranks from its config file.
    FINETUNE_REQUESTED_PROCESSES in `environ`, when set, is the number of ranks.
    """
    said = (environ or {}).get(REQUESTED_VARIABLE, "")
    wanted = int(said) if said.isdigit() else None
    split = _split(argv)
    if split is None:
        return wanted, None
    tool, options = split
    if tool == "accelerate":
        return wanted or _number(options.get("num_processes")), options.get("config_file")
    per_machine = _number(_torch_option(options, "nproc_per_node", environ or {}))
    machines = _number(_torch_option(options, "nnodes", environ or {}).rpartition(":")[2])
    return wanted or (per_machine * machines if per_machine and machines else None), None


def uses_default_config(argv: Sequence[str]) -> bool:
    """Whether this is an `accelerate launch` that reads the user's default config file."""
    split = _split(argv)
    return split is not None and split[0] == "accelerate" and not {"config_file", "cpu"} & set(split[1])


def default_config_file(environ: Mapping[str, str]) -> str | None:
    """The file that `accelerate launch` reads when it gets no --config_file and no --cpu (None: there is none)."""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.path.expanduser(environ.get("HF_HOME") or os.path.join(cache, "huggingface")))
    names = ("default_config.yaml", "default_config.json")
    return next((str(home / "accelerate" / n) for n in names if (home / "accelerate" / n).is_file()), None)


def _split(argv: Sequence[str]) -> tuple[str, dict[str, str]] | None:
    """("accelerate" | "torch", options) of a launcher's command line, None for any other program."""
    for i, argument in enumerate(argv[:8]):  # the program, perhaps behind an interpreter and its options
        name = os.path.basename(argument)
        module = argv[i + 1] if argument == "-m" and i + 1 < len(argv) else ""
        if name in _ACCELERATE_SCRIPTS:
            return "accelerate", _options(argv[i + 1 :])
        if name in ("accelerate", "accelerate.exe", "accelerate_cli.py") and argv[i + 1 : i + 2] == ["launch"]:
            return "accelerate", _options(argv[i + 2 :])
        if module in _ACCELERATE_MODULES:
            return "accelerate", _options(argv[i + 2 :])
        if module == "accelerate.commands.accelerate_cli" and argv[i + 2 : i + 3] == ["launch"]:
            return "accelerate", _options(argv[i + 3 :])
        if name in _TORCH_SCRIPTS:
            return "torch", _options(argv[i + 1 :])
        if module in _TORCH_MODULES:
            return "torch", _options(argv[i + 2 :])
        if (name.endswith(".py") and i > 0) or module:
            return None  # the program is another one; what follows are its own arguments
    return None


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """Options before the training script, named without dashes and with underscores."""
    options: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            break
        name, equals, value = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        options[name] = value if equals else "" if name in _FLAGS else next(rest, "")
    return options


def _torch_option(options: Mapping[str, str], name: str, environ: Mapping[str, str]) -> str:
    """torchrun's value of an option: it takes shortened names, and PET_<NAME> as the default."""
    given = [value for key, value in options.items() if len(key) > 2 and name.startswith(key)]
    return given[0] if given else environ.get(f"PET_{name.upper()}", "1")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
