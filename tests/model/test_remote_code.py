"""Models that bring Python code of their own: refused until the recipe says trust_remote_code."""

from __future__ import annotations

import json

import pytest
import torch

from finetune.errors import UserError
from finetune.launch.strategy import one_process
from finetune.model.facts import read_facts
from finetune.model.load import load_model
from finetune.model.tokenizer import load_tokenizer
from finetune.recipe.load import load_recipe
from tests.support.tiny_models import small_recipe

CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def recipe_path(tmp_path):
    path = small_recipe(tmp_path)
    (tmp_path / "base" / "own.py").write_text(CODE)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": own}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return path


def test_its_code_runs_only_when_the_recipe_trusts_it(recipe_path):
    with pytest.raises(UserError, match="which brings Python code of its own.*set model.trust_remote_code: true"):
        read_facts(load_recipe(recipe_path))
    loaded = load_recipe(recipe_path, ["model.trust_remote_code=true"])
    facts = read_facts(loaded)
    assert facts.architecture == "OwnModel"
    assert load_tokenizer(loaded) is not None
    network = load_model(loaded, one_process(), facts, torch.device("cpu"))
    assert type(network).__name__ == "OwnModel"
