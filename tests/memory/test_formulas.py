"""Memory as arithmetic, by hand and against real tensors: 4-bit weights, optimizers, one process, DDP, activations,
offload's traffic.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import Tensor, nn

from finetune.engine.storages import StorageTracker
from finetune.launch.strategy import Strategy, one_process
from finetune.memory.activations import HIGH, LOW, DecoderSize, activation_bytes, cast_bytes, layer_bytes
from finetune.memory.formulas import (
    checkpoint_bytes,
    exported_bytes,
    nf4_bytes,
    optimizer_bytes,
    resident_plain,
    saved_optimizer_bytes,
)
from finetune.memory.offload_traffic import (
    NVME_BYTES_PER_SECOND,
    PCIE_4_BYTES_PER_SECOND,
    Moved,
    fetched_elements,
    seconds,
    traffic,
)
from finetune.memory.resident import ITEMS
from finetune.model.parameters import Weight, Weights
from tests.support.forked import accelerate, run
from tests.support.launch import launch_file, program
from tests.support.tiny_models import small_recipe

GIB = 2**30
LLAMA_7B = DecoderSize(
    hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocabulary=32000
)
QWEN3_06B = DecoderSize(
    hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128, vocabulary=151936
)
# embedding 40 x 10 and head in float32; one layer of two matrices
SMALL = Weights(
    (
        Weight("embed.weight", 400, True, 4),
        Weight("layers.0.a.weight", 100, True, 4, 0),
        Weight("layers.0.b.weight", 200, True, 4, 0),
        Weight("head.weight", 400, True, 4),
    ),
    buffers_bytes=24,
)


def trained(*sizes: int) -> Weights:
    return Weights(tuple(Weight(f"w{i}.weight", n, True, 4) for i, n in enumerate(sizes)))


def storage_bytes(tensors) -> int:
    return sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)
        }.values()
    )


# 4-bit weights and optimizers


def test_nf4_by_hand():
    # 4096 x 4096 = 2^24 elements: 2^23 packed + 2^18 scales + 4 x 2^10 scales of scales + 64 + 1024 + 4
    assert nf4_bytes(2**24) == 8388608 + 262144 + 4096 + 1092
    # 3 x 130 = 390: 195 + ceil(390 / 64) = 7 + 4 x 1 + 1092
    assert nf4_bytes(390) == 1298


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (96, 33), (1000, 7), (130, 3), (512, 512), (67, 1)])
def test_nf4_is_what_bitsandbytes_holds(inputs, outputs):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compress_statistics=True).to(
        "cpu"
    )
    state = layer.weight.quant_state
    tensors = [layer.weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(inputs * outputs) == storage_bytes(tensors)


def test_optimizer_states_by_hand():
    assert optimizer_bytes([1000, 50], "adamw") == 8 * 1050 + 2 * 4
    assert optimizer_bytes([1000, 50], "sgd") == 0
    # 4095 stays float32: 32760. 5000: 10000 + 2 x 4 x ceil(5000 / 256) = 160. 4096: 8192 + 2 x 4 x 16 = 128. The
    # tables: 2048, once
    assert optimizer_bytes([4095, 5000, 4096], "adamw_8bit") == 32760 + 10160 + 8320 + 2048
    assert saved_optimizer_bytes([4095, 5000, 4096], "adamw_8bit") == 32760 + 10160 + 8320 + 2 * 2048
    assert optimizer_bytes([100], "paged_adamw_8bit") == saved_optimizer_bytes([100], "paged_adamw_8bit") == 800


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_optimizer_states_are_what_a_real_step_leaves(kind):
    from finetune.engine.optimizer import build_optimizer
    from finetune.recipe.fields import TrainingSection

    sizes = [100, 4095, 4096, 5000, 70000]
    parameters = [nn.Parameter(torch.randn(n)) for n in sizes]
    optimizer = build_optimizer(
        [{"params": parameters, "weight_decay": 0.0}],
        TrainingSection(optim=kind, learning_rate=1e-3),
        one_process(use_cpu=True),
    )
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with StorageTracker() as tracker:
        tracker.enter("first step")
        optimizer.step()
        before = tracker.live_bytes
        tracker.enter("step")
        optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    assert optimizer_bytes(sizes, kind) == storage_bytes(states)
    assert tracker.peaks["step"] == before, "a step takes nothing on the way"


def test_checkpoints_on_disk_by_hand():
    # 1100 trained: weights 4400, moments 8800 + 4 tensors' steps 16; three of them with save_total_limit 2; exported in
    # bf16: 2200
    assert checkpoint_bytes(SMALL, "adamw", one_process()) == 4400 + 8816
    # DeepSpeed: 1100 elements in float32 and, below ZeRO-3, in bf16, and their moments
    assert checkpoint_bytes(SMALL, "adamw", zero(2, "none", ranks=2)) == 2200 + 4400 + 8816
    assert checkpoint_bytes(SMALL, "adamw", zero(3, "none", ranks=2)) == 4400 + 8816
    assert exported_bytes(SMALL, "bfloat16") == 2200
    # adapters: the base is not in a checkpoint, and they are exported as they are
    lora = Weights((Weight("base.weight", 10000, False, 2), Weight("a.weight", 100, True, 4)))
    assert (checkpoint_bytes(lora, "adamw", one_process()), exported_bytes(lora, "bfloat16")) == (400 + 804, 400)


# one process and DDP


def test_one_process_by_hand():
    # parameters 4400 + buffers 24; gradients 4400 come with the backward; states 8800 + 16
    found = resident_plain(SMALL, 1, "adamw", on_cpu=False)
    assert found.device == {"parameters": 4424, "gradients": 0, "optimizer states": 8816}
    assert found.backward == found.step == {"device": {"gradients": 4400}}
    assert found.load == {"host": {"parameters": 4400}}
    # the checkpoint clones the states on the device, then has them on the host; the export has 4400 there, later
    assert found.save == {"host": {"optimizer states": 8816}}
    accumulating = resident_plain(SMALL, 1, "adamw", on_cpu=False, accumulates=True)
    assert accumulating.device["gradients"] == 4400 and not accumulating.backward and not accumulating.step
    on_cpu = resident_plain(SMALL, 1, "adamw", on_cpu=True)
    assert on_cpu.step == {"device": {"gradients": 4400}}
    assert on_cpu.load == {} and on_cpu.save == {"host": {"parameters": 4400}}
    sgd = resident_plain(SMALL, 1, "sgd", on_cpu=True)
    assert sgd.save == {"host": {"parameters": 4400}} and sgd.device["optimizer states"] == 0


def test_ddp_by_hand():
    # the buckets hold a gradient all the time, and micro-batches before the last one add up in them
    found = resident_plain(SMALL, 4, "adamw", on_cpu=False)
    assert found.device == {"parameters": 4424, "gradients": 4400, "optimizer states": 8816}
    assert found.backward == {"device": {"buffers": 1600}} and found.step == {}
    assert found.load == {"device": {"buffers": 4400}, "host": {"parameters": 4400}}
    assert resident_plain(SMALL, 4, "adamw", on_cpu=False, accumulates=True).device["gradients"] == 4400


def test_qlora_by_hand():
    base = Weight("q.weight", 8192, False, nf4_bytes(8192) / 8192, quantised=True)  # 4096 + 128 + 4 + 1092 = 5320
    found = resident_plain(
        Weights((base, Weight("norm.weight", 64, False, 2), Weight("a.weight", 32, True, 4))), 1, "adamw", on_cpu=False
    )
    assert found.device["parameters"] == 5320 + 128 + 128
    # quantised on the device, one 16-bit weight at a time; the rest is read on the host
    assert found.load == {"device": {"buffers": 16384}, "host": {"parameters": 256}}
    assert found.save["host"] == {"optimizer states": 8 * 32 + 4}


def test_every_item_has_a_known_name():
    for found in (
        resident_plain(SMALL, ranks, optim, on_cpu, accumulates)
        for ranks in (1, 2)
        for optim in ("adamw", "sgd")
        for on_cpu in (True, False)
        for accumulates in (True, False)
    ):
        parts = [
            found.device,
            *(part for moment in (found.backward, found.step, found.load, found.save) for part in moment.values()),
        ]
        assert {item for part in parts for item in part} <= set(ITEMS)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_real_runs_hold_these_bytes(tmp_path, ranks):
    recipe = small_recipe(tmp_path / "job")
    arguments = (*program("plain_memory"), recipe, tmp_path / "out.json")
    if ranks == 1:
        done = run([sys.executable, *arguments])
    else:
        done = accelerate(launch_file(tmp_path / "launch.yaml", ranks), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    real = json.loads((tmp_path / "out.json").read_text())
    weights = Weights(tuple(Weight(*weight) for weight in real["weights"]), real["buffers_bytes"])
    assert sum(resident_plain(weights, ranks, "adamw", True, accumulates=True).device.values()) == real["accumulating"]
    found = resident_plain(weights, ranks, "adamw", True)
    assert sum(found.device.values()) == real["resting"]
    assert sum(size for part in found.save.values() for size in part.values()) == real["saving"]


# activations without a trace


def test_a_layer_by_hand():
    # one token of Llama-2-7B in bf16: norms 2 x 6 x 4096 = 49152, their outputs 2 x 2 x 4096 = 16384,
    # attention 2 x 5 x 4096 + 4 x 32 = 41088, MLP 2 x 4 x 11008 = 88064
    assert layer_bytes(LLAMA_7B, 1, 2) == 49152 + 16384 + 41088 + 88064
    # under autocast the residual stream is float32 and five linear layers cast their input:
    # 2 x 8 x 4096 = 65536, 5 x 2 x 4096 = 40960
    assert layer_bytes(LLAMA_7B, 1, 2, autocast=True) == 65536 + 40960 + 41088 + 88064
    # Qwen3-0.6B: 2048 of queries, 1024 of keys: 2 x 6 x 1024, 2 x 2 x 1024, 2 x (3 x 2048 + 2 x 1024) + 64, 2 x 4 x
    # 3072
    assert layer_bytes(QWEN3_06B, 1, 2) == 12288 + 4096 + 16448 + 24576


def test_casts_of_weights_by_hand():
    # the layer's 300 and the head's (or the tied embedding's) 400, two bytes each; frozen weights are not cast
    assert cast_bytes(SMALL) == 1400
    assert cast_bytes(Weights((Weight("base.weight", 1000, False, 2, 0), Weight("a.weight", 10, True, 4, 0)))) == 20


def test_the_loss_by_hand():
    # 3 rows x 5 tokens x 151936 logits x 12 bytes
    assert activation_bytes(QWEN3_06B, 15, 15, 2, checkpointing=True)["loss"]["logits and loss"] == 27348480


@pytest.mark.parametrize(
    ("shape", "rows", "options", "moment", "traced_gib"),
    [
        # traced at 2048 tokens in bf16
        (LLAMA_7B, 1, {"checkpointing": False}, "layer", 11.7),
        (LLAMA_7B, 1, {"checkpointing": True}, "layer", 0.81),
        (LLAMA_7B, 1, {"checkpointing": False, "lora": True}, "layer", 17.0),
        (QWEN3_06B, 8, {"checkpointing": True}, "loss", 28.8),
    ],
)
def test_guesses_are_near_what_was_traced(shape, rows, options, moment, traced_gib):
    items = activation_bytes(shape, rows * 2048, rows * 2048, 2, **options)[moment].values()
    assert sum(items) / GIB == pytest.approx(traced_gib, rel=0.1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_real_layers_lie_in_the_range(family, autocast):
    import transformers

    sizes = dict(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    config = getattr(transformers, f"{family}Config")(vocab_size=64, **sizes)
    network = getattr(transformers, f"{family}Model")(config).to(torch.float32 if autocast else torch.bfloat16).train()
    shape = DecoderSize(128, 352, 4, 4, 2, 32, 64)
    with StorageTracker() as tracker:
        tracker.hold([*network.parameters(), *network.buffers()], "parameters")
        before = tracker.live_bytes
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept = network(input_ids=torch.zeros(2, 256, dtype=torch.long), use_cache=False).last_hidden_state.sum()
        alive = tracker.live_bytes - before
    weights = Weights(tuple(Weight(n, p.numel(), True, 4, 0) for n, p in network.layers.named_parameters()))
    casts = cast_bytes(weights) if autocast else 0
    assert kept.requires_grad
    found = activation_bytes(shape, 512, 512, 2, checkpointing=False, autocast=autocast)["layer"]["activations"]
    assert LOW * found < alive - casts < HIGH * found


# what offload moves


def zero(
    stage: int, optimizer: str = "cpu", parameters: str = "none", ranks: int = 1, precision: str = "bf16"
) -> Strategy:
    return Strategy("test", "deepspeed", ranks, 1, precision, False, stage, optimizer, parameters)


def test_nothing_moves_without_offload():
    assert traffic(SMALL, zero(3, "none"), "adamw", True).of_step(8) == Moved()


def test_zero_2_moves_gradient_and_weights_once_per_step():
    # 1100 elements on 2 ranks: 550 each; gradient float32 to the host, weights bf16 back, whatever K
    moves = traffic(SMALL, zero(2, ranks=2), "adamw", True)
    assert moves.of_step(1) == moves.of_step(64) == Moved(to_device_bytes=1100, to_host_bytes=2200)
    assert moves.of_step(64).pcie_bytes == 3300
    # in float32 the sum goes to and fro: K = 4 is 4 x 2200 each way, and 2200 as the optimizer's gradient; the first
    # micro-batch fetches nothing, and the weights come back with as many bytes
    assert traffic(SMALL, zero(2, ranks=2, precision="no"), "adamw", True).of_step(4) == Moved(8800, 11000)
    # ZeRO-1 does all that once, at the end of the window
    assert traffic(SMALL, zero(1, ranks=2, precision="no"), "adamw", True).of_step(4) == Moved(4400, 4400)


def test_fetches_by_hand():
    # forward embed a b head, backward head b a embed: with nothing kept everything twice
    assert fetched_elements(SMALL, False, 0, 0) == {
        "embed.weight": 800,
        "layers.0.a.weight": 200,
        "layers.0.b.weight": 400,
        "head.weight": 800,
    }
    # a layer's recomputation fetches once more what it does not keep; its last module stays
    assert fetched_elements(SMALL, True, 0, 0) == {
        "embed.weight": 800,
        "layers.0.a.weight": 300,
        "layers.0.b.weight": 400,
        "head.weight": 800,
    }
    # the head runs again at once; b sees head, head (800) before it runs again: kept with 801, and a needs 800 + 2 x
    # 200
    assert fetched_elements(SMALL, False, 1, 0)["head.weight"] == 400
    assert fetched_elements(SMALL, False, 800, 0)["layers.0.b.weight"] == 400
    assert fetched_elements(SMALL, False, 801, 0)["layers.0.b.weight"] == 200
    assert sum(fetched_elements(SMALL, True, 10**9, 0).values()) == 1100
    # norms come last in a layer's list, and run before its last matrix: small weights are not what the recomputation
    # ends in
    norm = Weight("layers.0.norm.weight", 10, True, 4, 0)
    with_norm = fetched_elements(Weights((*SMALL.all[:3], norm, SMALL.all[3])), True, 0, 50)
    assert with_norm["layers.0.b.weight"] == 400 and "layers.0.norm.weight" not in with_norm
    # what is small never leaves
    assert fetched_elements(SMALL, True, 0, 100).keys() == {"embed.weight", "layers.0.b.weight", "head.weight"}


@pytest.mark.slow
def test_fetches_are_what_deepspeed_does(tmp_path):
    recipe = small_recipe(tmp_path / "job", tie=False)
    config = launch_file(tmp_path / "launch.yaml", 1, zero_stage=3, offload_optimizer="cpu", offload_param="cpu")
    # a layer has 9280 elements, the head 14336: some weights stay from the recomputation to the backward, some do not
    done = accelerate(config, *program("fetches"), recipe, tmp_path / "out.json", "5000")
    assert done.returncode == 0, done.stderr[-3000:]
    real = json.loads((tmp_path / "out.json").read_text())
    assert set(real["fetches"].values()) == {1, 2, 3}
    # in the order they run, which is not the one they are defined in
    order = [
        "embed",
        "input_layernorm",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "post_attention",
        "gate",
        "up",
        "down",
        "norm",
        "lm_head",
    ]
    weights = []
    for name, elements in real["elements"].items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        weights.append(Weight(name, elements, True, 4, layer))
    place = {"embed": -1, None: 99}
    weights.sort(
        key=lambda w: (
            w.layer if w.layer is not None else place["embed"] if "embed" in w.name else 99,
            next(i for i, part in enumerate(order) if part in w.name),
        )
    )
    found = fetched_elements(Weights(tuple(weights)), True, 5000, 0)
    assert found == {name: count * real["elements"][name] for name, count in real["fetches"].items()}


# a model of four layers of 2 x 10^9 elements: above DeepSpeed's reuse distance of 10^9
BIG = Weights(tuple(Weight(f"layers.{i}.{part}.weight", 1_000_000_000, True, 4, i) for i in range(4) for part in "ab"))


def test_zero_3_offload_by_hand():
    # P = 8e9, 2 ranks, bf16. Gradient to the device and back per micro-batch: 4 x 4e9 each way; once more to the host
    # per step. Fetched: a is 1e9 (b) from running again at the last layer's turn, not within 1e9: forward,
    # recomputation, backward. b stays from its recomputation to its backward; at the turn it stays from its forward,
    # too (a is 1e9 in between: no). So a 3, b 2 times
    moves = traffic(BIG, zero(3, "cpu", "cpu", ranks=2), "adamw", True)
    assert moves.micro_batch == Moved(to_device_bytes=16e9 + 2 * 4 * 5e9 / 2, to_host_bytes=16e9)
    assert moves.step == Moved(to_host_bytes=16e9)
    # weights that live on the device come back once: 2 x 4e9
    assert traffic(BIG, zero(3, "cpu", ranks=2), "adamw", True).step == Moved(to_device_bytes=8e9, to_host_bytes=16e9)
    # frozen weights are fetched, and have no gradients
    frozen = Weights(tuple(Weight(w.name, w.elements, False, 2, w.layer) for w in BIG.all))
    assert traffic(frozen, zero(3, "cpu", "cpu"), "adamw", True).micro_batch == Moved(to_device_bytes=2 * 20e9)


def test_nvme_by_hand_and_why_k_is_the_lever():
    # states: master 4, moments 8, gradient 4: 16 x 8e9 read and written once; weights read with every fetch, written
    # once
    moves = traffic(BIG, zero(3, "nvme", "nvme"), "adamw", True)
    assert moves.step == Moved(to_host_bytes=32e9, nvme_read_bytes=128e9, nvme_write_bytes=128e9 + 16e9)
    assert moves.micro_batch.nvme_read_bytes == 2 * 20e9
    assert moves.of_step(1).nvme_bytes == 312e9 and moves.of_step(16).nvme_bytes == 272e9 + 16 * 40e9


def test_175b_needs_a_quarter_of_an_hour_of_disk_per_step():
    # 175e9 x 32 bytes / 6e9 per second = 933 s
    gpt3 = Weights(tuple(Weight(f"h.{i}.mlp.weight", 1_750_000_000, True, 4, i) for i in range(100)))
    step = traffic(gpt3, zero(3, "nvme", "cpu"), "adamw", True).step
    assert seconds(step).nvme == pytest.approx(175e9 * 32 / 6e9) == pytest.approx(933, abs=1)


def test_seconds_by_hand():
    found = seconds(Moved(25e9, 50e9, 6e9, 12e9), ranks_per_disk=4)
    assert (found.pcie, found.nvme) == (75e9 / PCIE_4_BYTES_PER_SECOND, 4 * 18e9 / NVME_BYTES_PER_SECOND) == (3.0, 12.0)
