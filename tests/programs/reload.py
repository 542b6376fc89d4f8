"""A new process that knows plain transformers and peft only: evaluation loss of trained folders. Prints one JSON
object.

Arguments: run folders. The rows come from our data module, the models from from_pretrained.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune.data.prepare import prepare
from finetune.recipe.load import load_recipe


def load(run: Path, in_4_bits: bool):
    folder = run / "model"
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    if not in_4_bits:
        return AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    # not eval(): on some CPUs bitsandbytes would repack the layers, which it cannot do with layers as small as ours
    return AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=config).train()


@torch.no_grad()
def evaluation_loss(run: Path) -> float:
    loaded = load_recipe(run / "recipe.yaml")
    rows = prepare(loaded, AutoTokenizer.from_pretrained(run / "model"), lambda text: None).evaluation
    model = load(run, loaded.recipe.model.load_in_4bit)
    loss, tokens = 0.0, 0
    for i in range(len(rows)):
        row = rows.row(i)
        ids, labels = (torch.from_numpy(a.astype("int64"))[None] for a in (row.input_ids, row.labels))
        log_probabilities = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        trained = labels[0, 1:] != -100
        loss -= float(log_probabilities[trained, labels[0, 1:][trained]].sum())
        tokens += int(trained.sum())
    return loss / tokens


print(json.dumps({run: evaluation_loss(Path(run)) for run in sys.argv[1:]}))
