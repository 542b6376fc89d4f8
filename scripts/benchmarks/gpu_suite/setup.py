"""What every case of scripts/benchmarks/gpu_suite/run.py knows of its run, and the preparations that leave models and
C++ ops for the others.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Qwen3-0.6B's and Qwen3-1.7B's shapes; the tokenizer is smaller than the vocabulary, which the loss is made of all the
# same
FULL = {
    "small": dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=4096,
    ),
    "large": dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=4096,
    ),
}
TINY = {
    "small": dict(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=4096,
        max_position_embeddings=1024,
    )
}
OFFLOAD = dict(zero_stage=3, offload_optimizer="cpu", offload_param="cpu")


class NotRun(Exception):
    """The case cannot run here, and why; no failure."""


@dataclass(frozen=True)
class Setup:
    """One run of the suite: where it works, and whether it is the small one on the CPU."""

    folder: Path
    small: bool

    @property
    def sizes(self) -> dict[str, dict]:
        """Config values of each model by its name."""
        return TINY if self.small else FULL

    @property
    def tokens(self) -> int:
        """Of a row."""
        return 128 if self.small else 2048

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return 2

    @property
    def disk(self) -> Path:
        """Where NVMe offload writes: not in memory, where the suite may work."""
        return Path(tempfile.gettempdir()) / f"{self.folder.name}-nvme"

    @property
    def launch(self) -> dict:
        """What launch files of this run share, as keyword arguments of launch_support.launch_file."""
        return {"ranks": 1, "use_cpu": self.small, "precision": "no" if self.small else "bf16"}

    @property
    def threads(self) -> int:
        """Of a case that runs alone: CPU offload wants all cores."""
        return 1 if self.small else len(os.sched_getaffinity(0))

    def model(self, name: str) -> Path:
        """The folder of a model that `prepare models` made; the small run has one for all."""
        return self.folder / "models" / (name if name in self.sizes else "small")

    def case_folder(self, name: str) -> Path:
        """Where a case works; removed after it."""
        return self.folder / "cases" / re.sub(r"\W+", "-", name)

    def prepared(self, name: str) -> dict:
        """What a preparation left for the others. Raises NotRun when there is nothing: it did not end well."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            raise NotRun(f"{name} did not end well")
        return json.loads(file.read_text())

    def leave(self, name: str, found: dict) -> dict:
        """Leave what a preparation found for the others; returns it."""
        (self.folder / f"{name}.json").write_text(json.dumps(found))
        return found


def launched(config: Path, *arguments: str | Path, threads: int = 1) -> None:
    """A program under `accelerate launch`, to its end. Raises RuntimeError with its last words when it fails."""
    from tests.support.launch import accelerate

    done = accelerate(config, *arguments, env={"OMP_NUM_THREADS": str(threads)}, timeout=3600)
    if done.returncode:
        said = done.stderr.split("Traceback (most recent call last):")
        # the launcher's own, below the program's
        if any(word in said[-1] for word in ("CalledProcessError", "ChildFailedError")):
            del said[-1]
        raise RuntimeError("\n".join(line for line in "Traceback:".join(said).splitlines() if line.strip())[-3000:])


def prepare_models(setup: Setup, folder: Path) -> dict:
    """Random models of this run's sizes with a tokenizer trained on the quick start's text; what machine this is."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from finetune.engine.devices import device_name, has_accelerator
    from scripts.quickstart.tiny_model import train_tokenizer

    if not setup.small and not has_accelerator():
        raise SystemExit("torch sees no GPU here. On a CPU: scripts/gpu_suite.sh --cpu-small --out FOLDER")
    tokenizer, parameters = train_tokenizer(), {}
    for name, sizes in setup.sizes.items():
        torch.manual_seed(0)
        config = Qwen3Config(
            **sizes,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        with torch.device("cpu" if setup.small else torch.accelerator.current_accelerator()):
            network = Qwen3ForCausalLM(config)
        network.to(torch.bfloat16).save_pretrained(setup.model(name))
        tokenizer.save_pretrained(setup.model(name))
        parameters[name] = network.num_parameters()
    found = {
        "device": "CPU" if setup.small else device_name(),
        "driver": driver(),
        "host_bytes": host_bytes(),
        "cores": len(os.sched_getaffinity(0)),
        "parameters": parameters,
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    return setup.leave("prepare models", found)


def driver() -> str | None:
    """Of the first GPU, as nvidia-smi says; None where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.split("\n")[0].strip() or None


def host_bytes() -> int:
    """Memory of this machine."""
    import psutil

    return psutil.virtual_memory().total


def prepare_op(setup: Setup, folder: Path) -> dict:
    """DeepSpeed's CPU Adam built, which offload needs."""
    build_op(setup, "cpu_adam")
    return setup.leave("prepare CPU Adam", {"cpu_adam": "built"})


def build_op(setup: Setup, name: str) -> None:
    """Build DeepSpeed's C++ op cpu_adam or async_io unless it is. Raises NotRun with the reason where it cannot be
    built; the small run does not build async_io, which takes minutes."""
    from finetune.engine.deepspeed.compile import op_is_built
    from finetune.engine.libraries import prepare_libraries

    prepare_libraries(use_cpu=setup.small)
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    builder = {"cpu_adam": CPUAdamBuilder, "async_io": AsyncIOBuilder}[name]()
    if setup.small and name == "async_io" and not op_is_built(name):
        raise NotRun("async_io is not built on this machine yet, and --cpu-small does not build it: it takes minutes")
    if not builder.is_compatible(verbose=True):
        raise NotRun(
            f"DeepSpeed says that {name} cannot be built here{' (libaio-dev missing?)' * (name == 'async_io')}"
        )
    try:
        builder.load(verbose=False)
    except Exception as error:  # any compiler's failure is what the row says
        raise NotRun(f"{name} does not build: {' '.join(str(error).split())[:300]}") from error


def hang(setup: Setup, folder: Path) -> None:
    """Never end, and start a process in a session of its own that does not either."""
    child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    print(f"started {child.pid}", file=sys.stderr, flush=True)
    time.sleep(3600)


def die(setup: Setup, folder: Path) -> None:
    """End as the kernel ends what takes too much memory."""
    print("about to be killed", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
