"""Launch files: the shipped ones are what they say; what accelerate would misread is refused with its line."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.launch.config_file import DEEPSPEED_KEYS, INERT, INSTEAD, READ, UNSUPPORTED, read_launch_file
from finetune.launch.preflight import merge_knobs
from finetune.launch.strategy import Strategy
from finetune.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
# name: engine, ranks, machines, precision, CPU, ZeRO stage, optimizer offload, parameter offload
SHIPPED = {
    "cpu": ("single", 1, 1, "no", True, 0, "none", "none"),
    "cpu_2_ranks": ("ddp", 2, 1, "no", True, 0, "none", "none"),
    "single_gpu": ("single", 1, 1, "bf16", False, 0, "none", "none"),
    "multi_gpu": ("ddp", 8, 1, "bf16", False, 0, "none", "none"),
    "zero1": ("deepspeed", 8, 1, "bf16", False, 1, "none", "none"),
    "zero2": ("deepspeed", 8, 1, "bf16", False, 2, "none", "none"),
    "zero3": ("deepspeed", 8, 1, "bf16", False, 3, "none", "none"),
    "zero2_offload": ("deepspeed", 8, 1, "bf16", False, 2, "cpu", "none"),
    "zero3_offload": ("deepspeed", 8, 1, "bf16", False, 3, "cpu", "cpu"),
    "zero3_offload_cpu_2_ranks": ("deepspeed", 2, 1, "no", True, 3, "cpu", "cpu"),
    "zero3_nvme": ("deepspeed", 8, 1, "bf16", False, 3, "nvme", "nvme"),
    "multi_node_zero3_offload": ("deepspeed", 16, 2, "bf16", False, 3, "cpu", "cpu"),
}
GPU = "distributed_type: MULTI_GPU\nnum_processes: 2\n"
ZERO3 = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  zero_stage: 3\n"


def problems(tmp_path, text):
    (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_launch_file(tmp_path / "launch.yaml")
    return [message.replace(f"{tmp_path}/", "") for message in caught.value.messages]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_what_their_names_say(name):
    s = read_launch_file(CONFIGS / f"{name}.yaml")
    assert (
        s.engine,
        s.ranks,
        s.machines,
        s.mixed_precision,
        s.use_cpu,
        s.zero_stage,
        s.offload_optimizer,
        s.offload_param,
    ) == SHIPPED[name]
    assert s.gradient_accumulation_steps is None and s.gradient_clipping is None
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert text.startswith("# ") and "gradient_accumulation_steps:" not in text and "gradient_clipping:" not in text


def test_every_shipped_file_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SHIPPED)


def test_the_keys_we_know_are_those_of_the_installed_accelerate():
    source = Path(find_spec("accelerate").origin).parent / "commands"
    config = (source / "config" / "config_args.py").read_text()
    cluster = config[: config.index("class SageMakerConfig")]
    for key in (INERT | READ | UNSUPPORTED) - set(INSTEAD):
        assert f"    {key}: " in cluster or key == "dynamo_backend", key
    options = (source / "launch.py").read_text()
    for key in DEEPSPEED_KEYS:
        assert f'"--{key}"' in options


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (GPU + "mixed_precision: no\n", 3, "write 'no' with quotes"),
        (GPU + "mixed_precision: fp8\n", 3, "it must be no, bf16 or fp16"),
        (GPU + "mixed_precison: bf16\n", 3, "Did you mean mixed_precision?"),
        (GPU + "zero_stage: 3\n", 3, "zero_stage belongs under deepspeed_config"),
        (GPU + "fp16: true\n", 3, "write mixed_precision: fp16"),
        (GPU + "use_cpu: 'true'\n", 3, "use_cpu is 'true'; it must be true or false, without quotes."),
        (GPU + "fsdp_config: {fsdp_version: 2}\n", 3, "fsdp_config is not supported"),
        (GPU + "dynamo_config: {dynamo_backend: INDUCTOR}\n", 3, "dynamo_config is not supported"),
        (GPU + "num_machines: 4\n", 2, "num_processes is 2 over all machines; 4 does not divide it."),
        (GPU + "num_processes: 2\n", 3, "num_processes is given twice"),
        (GPU + "compute_environment: AMAZON_SAGEMAKER\n", 3, "must be LOCAL_MACHINE"),
        (GPU + "deepspeed_config: {zero_stage: 3}\n", 3, "ignored with distributed_type MULTI_GPU"),
        ("distributed_type: MULTI_GPU\n", 1, "num_processes is missing"),
        ("distributed_type: MULTI_GPU\nnum_processes: two\n", 2, "num_processes is 'two'"),
        ("num_processes: 2\n", 1, "distributed_type is missing"),
        ("use_cpu: true\ndistributed_type: MULTI_CPU\nnum_processes: 2\n", 2, "MULTI_CPU starts one process"),
        ("distributed_type: 'NO'\nnum_processes: 2\n", 2, "distributed_type NO starts 1"),
        ("distributed_type: NO\n", 1, "write 'NO' with quotes"),
        ("distributed_type: FSDP\nnum_processes: 2\n", 1, "is 'FSDP'; it must be NO, MULTI_GPU or DEEPSPEED"),
        (ZERO3 + "  zero3_int_flag: true\n", 5, "Did you mean zero3_init_flag?"),
        (ZERO3 + "  num_machines: 1\n", 5, "It is a key of the top level."),
        (ZERO3 + "  deepspeed_config_file: ds.json\n", 5, "Write its settings under deepspeed_config"),
        (ZERO3 + "  offload_param_device: gpu\n", 5, "it must be none, cpu or nvme"),
        (ZERO3 + "  offload_param_device: nvme\n", 5, "add offload_param_nvme_path"),
        (ZERO3 + "  gradient_clipping: high\n", 5, "it must be a number above 0"),
        (ZERO3 + "num_machines: 2\n", 3, "deepspeed_multinode_launcher: standard"),
        (ZERO3.replace("3", "2") + "  offload_param_device: cpu\n", 5, "needs ZeRO stage 3, not 2"),
        (ZERO3.replace("3", "2") + "  offload_optimizer_device: nvme\n", 5, "needs ZeRO stage 3, not 2"),
        (ZERO3.replace("3", "4"), 4, "it must be 1, 2 or 3"),
        ("distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: 3\n", 3, "it must be a mapping"),
    ],
)
def test_refused_with_the_line(tmp_path, text, line, words):
    found = problems(tmp_path, text)
    assert any(m.startswith(f"launch.yaml:{line}: ") and words in m for m in found), found


def test_all_problems_of_a_launch_file_at_once(tmp_path):
    text = "distributed_type: MULTI_CPU\nnum_processes: 0\nmixed_precision: no\nnum_machine: 1\n"
    assert [message.split(":")[1] for message in problems(tmp_path, text)] == ["1", "2", "3", "4"]


def test_what_accelerate_config_writes_is_accepted(tmp_path):
    text = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: auto
  gradient_clipping: 0.5
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
downcast_bf16: 'no'
enable_cpu_affinity: false
dynamo_config: {}
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
    (tmp_path / "launch.yaml").write_text(text)
    strategy = read_launch_file(tmp_path / "launch.yaml")
    assert (strategy.zero_stage, strategy.gradient_accumulation_steps, strategy.gradient_clipping) == (2, None, 0.5)


def test_no_file_and_no_launch_file(tmp_path):
    with pytest.raises(UserError, match="no such launch file"):
        read_launch_file(tmp_path / "gone.yaml")
    (tmp_path / "x.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="is not an accelerate launch file"):
        read_launch_file(tmp_path / "x.yaml")


def strategy_with(steps=None, clipping=None):
    return Strategy(
        "launch.yaml", "deepspeed", 2, 1, "no", True, 3, gradient_accumulation_steps=steps, gradient_clipping=clipping
    )


def recipe_with(tmp_path, training="{}"):
    text = "model: {name_or_path: org/model}\ndata: {train: [{path: org/rows}]}\noutput_dir: x\ntraining: "
    (tmp_path / "recipe.yaml").write_text(text + training)
    return load_recipe(tmp_path / "recipe.yaml")


def test_the_launch_file_fills_what_the_recipe_leaves_open(tmp_path):
    assert merge_knobs(recipe_with(tmp_path), strategy_with()) == ("auto", 1.0)
    assert merge_knobs(recipe_with(tmp_path), strategy_with(4, 0.5)) == (4, 0.5)
    auto = recipe_with(tmp_path, "{gradient_accumulation_steps: auto}")
    assert merge_knobs(auto, strategy_with(4)) == (4, 1.0)


def test_two_owners_of_a_knob_must_agree(tmp_path):
    loaded = recipe_with(tmp_path, "{gradient_accumulation_steps: 8, max_grad_norm: 0.3}")
    assert merge_knobs(loaded, strategy_with(8, 0.3)) == (8, 0.3)
    with pytest.raises(UserError) as caught:
        merge_knobs(loaded, strategy_with(4, 1.0))
    first, second = caught.value.messages
    assert "recipe.yaml:4: training.gradient_accumulation_steps is 8" in first
    assert "says gradient_accumulation_steps 4" in first
    assert "training.max_grad_norm is 0.3" in second and "(launch.yaml) says gradient_clipping 1" in second
