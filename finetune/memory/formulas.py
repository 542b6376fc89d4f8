"""Memory of one process and DDP, of quantised weights, optimizers and checkpoints, as arithmetic. Torch-free; ZeRO:
zero/.

What allocators round up (CUDA's to 512 bytes) and keep is not in here.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from finetune.engine.deepspeed.buffers import compute_bytes
from finetune.launch.strategy import Strategy
from finetune.memory.resident import Resident
from finetune.model.parameters import DTYPE_BYTES, Weights

MOMENTS_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}  # per trained parameter
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
NF4_TABLES_BYTES = 16 * 4 + 256 * 4 + 4  # of every weight: the 16 levels, the 256 of its scales, their mean
EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST_ELEMENTS = 256, 4096
EIGHT_BIT_TABLES_BYTES = 2 * 256 * 4  # the levels of the two moments
DDP_BROADCAST_BYTES = 250 * 2**20


def nf4_bytes(elements: int) -> int:
    """A weight in NF4 with double quantisation: packed halves of bytes, an 8-bit scale per 64 of them, a float32 scale
    per 256 scales.

    Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3: 0.5 + 8/64/8 + 32/(64 x 256)/8 bytes per element. The
    rounding and the tables: bitsandbytes 0.50, functional.py, quantize_4bit and quantize_blockwise."""
    scales = ceil(elements / NF4_BLOCK)
    return ceil(elements / 2) + scales + 4 * ceil(scales / NF4_NESTED_BLOCK) + NF4_TABLES_BYTES


def optimizer_bytes(sizes: Iterable[int], optim: str) -> int:
    """States of an optimizer after its first step, for trained tensors of these elements.

    AdamW: two float32 moments, and a float32 step count per tensor (torch 2.13, optim/adamw.py). 8 bits: two bytes per
    element and two float32 scales per 256, but tensors below 4096 elements stay float32; the tables once (bitsandbytes
    0.50, optim/optimizer.py, Optimizer2State.init_state). Paged ones are as large; CUDA may move them to the host.
    Plain SGD has none."""
    sizes = list(sizes)
    if optim == "sgd":
        return 0
    if optim == "adamw":
        return sum(MOMENTS_BYTES[optim] * n + 4 for n in sizes)
    large = [n for n in sizes if n >= EIGHT_BIT_LEAST_ELEMENTS]
    states = sum(MOMENTS_BYTES[optim] * n + 2 * 4 * ceil(n / EIGHT_BIT_BLOCK) for n in large)
    small = sum(MOMENTS_BYTES["adamw"] * n for n in sizes if n < EIGHT_BIT_LEAST_ELEMENTS)
    return states + small + (EIGHT_BIT_TABLES_BYTES if large else 0)


def saved_optimizer_bytes(sizes: Iterable[int], optim: str) -> int:
    """The same on disk, and while it is saved: there every tensor has its own copy of the 8-bit tables
    (engine/state.py, _split).
    """
    sizes = list(sizes)
    tables = 0
    if "8bit" in optim:
        tables = max(0, sum(n >= EIGHT_BIT_LEAST_ELEMENTS for n in sizes) - 1) * EIGHT_BIT_TABLES_BYTES
    return optimizer_bytes(sizes, optim) + tables


def checkpoint_bytes(weights: Weights, optim: str, strategy: Strategy) -> float:
    """One checkpoint on disk, over all ranks: the trained weights and the optimizer's states. DeepSpeed saves the
    float32 copy; below ZeRO-3 rank 0 adds the weights in the compute type (mp_rank_00_model_states.pt).
    """
    trained = [weight for weight in weights.all if weight.trained]
    states = saved_optimizer_bytes((w.elements for w in trained), optim)
    if strategy.engine == "deepspeed":
        copies = 4 + (compute_bytes(strategy) if strategy.zero_stage < 3 else 0)
        return copies * weights.trained_elements + states
    return sum(w.elements * w.bytes_each for w in trained) + states


def exported_bytes(weights: Weights, dtype: str) -> float:
    """The exported model on disk: the whole model in this type, or the adapters as they are."""
    if weights.trained_elements == weights.elements:
        return weights.elements * DTYPE_BYTES[dtype]
    return sum(w.elements * w.bytes_each for w in weights.all if w.trained)


def resident_plain(weights: Weights, ranks: int, optim: str, on_cpu: bool, accumulates: bool = False) -> Resident:
    """One process (`ranks` 1) or one rank of DDP, whose memory does not depend on how many there are.

    Mixed precision changes nothing here: weights, gradients and moments stay float32, and what autocast makes of the
    weights is part of the activations. `accumulates`: windows have more than one micro-batch, and the second one's
    forward meets gradients. DDP with gradient_as_bucket_view keeps gradients in its buckets, all the time (torch 2.13,
    reducer.cpp); the engine clears them in place, so that windows of several micro-batches add up there, too."""
    trained = [weight for weight in weights.all if weight.trained]
    sizes = [weight.elements for weight in trained]
    gradients = sum(w.elements * w.bytes_each for w in trained)
    largest = max((w.elements * w.bytes_each for w in trained), default=0)
    ddp = ranks > 1
    standing = gradients * (ddp or accumulates)
    device = {
        "parameters": weights.bytes + weights.buffers_bytes,
        "gradients": standing,
        "optimizer states": optimizer_bytes(sizes, optim),
    }
    coming = {} if standing else {"gradients": gradients}
    backward = coming | ({"buffers": largest} if ddp else {})  # a gradient on its way into the bucket
    return Resident(
        device=device,
        backward={"device": backward} if backward else {},
        step={"device": coming} if coming else {},
        load=_load(weights, ddp, on_cpu),
        save=_save(weights, optim, on_cpu),
    )


def _load(weights: Weights, ddp: bool, on_cpu: bool) -> dict[str, dict[str, float]]:
    """What reading the checkpoint takes for a moment (model/load.py): it is read on the host and then moved, but
    for 4-bit weights, which are quantised on the device, one 16-bit weight at a time; DDP sends rank 0's weights round
    in pieces."""
    read = sum(w.elements * w.bytes_each for w in weights.all if not w.quantised)
    buffers = max((2.0 * w.elements for w in weights.all if w.quantised), default=0.0)
    if ddp:
        buffers = max(buffers, min(DDP_BROADCAST_BYTES, weights.bytes))
    load = {"device": {"buffers": buffers}} if buffers else {}
    return load if on_cpu else load | {"host": {"parameters": read}}


def _save(weights: Weights, optim: str, on_cpu: bool) -> dict[str, dict[str, float]]:
    """What saving takes on rank 0 on top, between two windows, one after the other: a checkpoint copies the optimizer's
    tensors from a GPU to the host, and on the host only the 8-bit tables that tensors share (engine/state.py, _split);
    the export gathers its tensors on the host (engine.full_state_dict)."""
    trained = [weight for weight in weights.all if weight.trained]
    sizes = [weight.elements for weight in trained]
    states = saved_optimizer_bytes(sizes, optim)
    copied = states - optimizer_bytes(sizes, optim) if on_cpu else states
    export = (
        weights.bytes
        if weights.trained_elements == weights.elements
        else sum(w.elements * w.bytes_each for w in trained)
    )
    return {"host": {"parameters": export} if export > copied else {"optimizer states": copied}}
