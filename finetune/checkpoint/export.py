"""A checkpoint as the folder that the run's end would have written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from finetune.checkpoint.identity import base_fingerprint, comparable, differences, tokenizer_fingerprint
from finetune.checkpoint.manifest import Snapshot
from finetune.engine.kinds import read_trained
from finetune.errors import UserError
from finetune.launch.strategy import one_process
from finetune.model.facts import read_facts
from finetune.model.load import grow_embedding, load_model
from finetune.model.save import write_model
from finetune.model.tokenizer import load_tokenizer
from finetune.recipe.load import LoadedRecipe
from finetune.report import redact

OF_THE_MODEL = ("model.", "lora.")


def export_snapshot(found: Snapshot, loaded: LoadedRecipe, output: Path) -> str:
    """Write the checkpoint `found` of the run that `loaded` describes to `output`; returns what was written.

    One process, on the CPU, no process group: 8 bytes of host memory per parameter of a fully trained model; of an
    adapter's base no weight is read. Raises UserError (another base, weights missing) and BrokenExport.
    """
    same = found.facts["same"]
    facts = read_facts(loaded)
    tokenizer = load_tokenizer(loaded)
    _refuse_another_model(found, loaded, tokenizer)
    saved = read_trained(found.folder, sharded=same["engine"] == "DeepSpeed")
    where = torch.device("cpu" if loaded.recipe.lora is None else "meta")
    network = load_model(loaded, one_process(same["mixed precision"], use_cpu=True), facts, where)
    state = _whole_state(found, network, saved)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_model(state, network, tokenizer, output, facts.export_dtype)
    if loaded.recipe.lora is None:
        return f"{facts.architecture}, {facts.export_dtype}"
    return f"an adapter of {loaded.recipe.model.name_or_path}"


def _refuse_another_model(found: Snapshot, loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """The recipe, base and tokenizer of now must be those that the checkpoint was written with."""
    section, same = loaded.recipe.model, found.facts["same"]
    now = redact.tree(comparable(loaded.recipe.model_dump(mode="json", exclude_none=True)))
    then, now = ({k: v for k, v in keys.items() if k.startswith(OF_THE_MODEL)} for keys in (same["recipe"], now))
    different = differences(
        {"recipe": then, "base model": same["base model"], "tokenizer": same["tokenizer"]},
        {
            "recipe": now,
            "base model": base_fingerprint(section.name_or_path, section.revision),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        },
    )
    if different:
        raise UserError(
            f"{found.folder}: was written with another model: {'; '.join(different)}. Put back what was there."
        )


def _whole_state(found: Snapshot, network: nn.Module, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was trained, as saved, and of a full model the buffers that belong to a file."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if missing := sorted(trained.keys() - saved.keys()):
        raise UserError(
            f"{found.folder}: lacks {len(missing)} trained weights of {type(network).__name__}:"
            f" {', '.join(missing[:3])}."
        )
    embedding = next((n for n, p in trained.items() if p is network.get_input_embeddings().weight), None)
    if embedding is not None and len(saved[embedding]) > len(trained[embedding]):
        grow_embedding(network, len(saved[embedding]))  # the run let it grow for its data's tokens
    state = {name: saved[name] for name in trained}
    if not hasattr(network, "peft_config"):
        persistent = network.state_dict().keys()
        state |= {name: buffer for name, buffer in network.named_buffers() if name in persistent}
    return state
