"""A rank's bytes under ZeRO-1 and ZeRO-2 (stages.py). File names are below deepspeed/runtime, 0.19.8. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from finetune.memory.resident import Resident
from finetune.memory.zero.layout import BUFFERS, GRADIENT_BYTES, GRADIENTS, MASTER_BYTES, PARAMETERS, STATES, Layout
from finetune.model.parameters import Weight


def stage_1_and_2(at: Layout) -> Resident:
    """ZeRO-1 and 2 (zero/stage_1_and_2.py; ZeRO-1 in bf16 without offload: bf16_optimizer.py).

    Always: the trained weights in one flat buffer, a multiple of 2 x ranks elements, that the module's parameters look
    into; this rank's part of it in float32 with its moments. With offload also the part in 16 bits and its gradient on
    the host, and a buffer of the largest parameter on either side (temp_grad_buffer_for_*_offload). Backward: a bucket
    (setup_buckets), its flattened copy (allreduce_bucket), and in mixed precision a float32 copy of one slice of it
    (_add_to_grad_partition_buffer)."""
    unit = 2 * at.ranks
    trained = -(-at.weights.trained_elements // unit) * unit
    part = trained // at.ranks
    offload, host = at.optimizer_place != "device", "host" if at.optimizer_place != "device" else "device"
    device, compute = at.always["device"], at.compute
    device[PARAMETERS] += compute * trained + sum(w.elements * at.stored_bytes(w) for w in at.frozen)
    size = MASTER_BYTES * part
    at.always[host][STATES] += (at.host_bytes(size) if offload else size) + at.moments * part
    if offload:
        device[BUFFERS] += compute * at.largest_trained
        at.always["host"][BUFFERS] += at.host_bytes(compute * part) + at.host_bytes(compute * at.largest_trained)
        at.always["host"][GRADIENTS] += at.host_bytes(GRADIENT_BYTES * part)
    flattened = min(at.bucket, trained)
    if at.strategy.zero_stage == 1 and at.strategy.mixed_precision == "bf16" and not offload:
        _bf16_gradients(at, trained, part)
    elif at.strategy.zero_stage == 1:
        _stage_1_gradients(at, trained, part)
    else:
        _stage_2_gradients(at, part)
        at.backward["device"][BUFFERS] += compute * at.bucket
        at.flush["device"][BUFFERS] += compute * flattened if at.ranks > 1 or at.mixed else 0
        at.flush["device"][BUFFERS] += GRADIENT_BYTES * min(at.largest_trained, part) if at.mixed else 0
    # every rank reads the whole model in float32 on the host; on the device the weights are cast, then flattened beside
    # themselves
    read = 4.0 * at.weights.trained_elements + sum(w.elements * w.bytes_each for w in at.frozen)
    flattening = compute * trained + device[PARAMETERS]
    at.load["host"][PARAMETERS] += max(read, flattening) if at.on_cpu else read
    # where a GPU has no room for a second copy, DeepSpeed flattens on the host (the check before "Flatten on
    # accelerator device")
    at.load["device"][PARAMETERS] += flattening if at.on_cpu else device[PARAMETERS]
    at.saving(size)
    return at.result()


def _stage_2_gradients(at: Layout, part: int) -> None:
    """In mixed precision a flat float32 buffer of this rank's part (_build_compact_grad_partition_buffer), there until
    the step. In float32 whole parameters that touch the part: on the device a buffer per micro-batch
    (copy_grads_in_partition), of which the first is added to, and flattened for the step; with offload a tensor per
    parameter on the host (async_accumulate_grad_in_cpu_via_gpu)."""
    touching = _touching(at.trained, part, at.ranks)
    window = at.always if at.accumulates else at.backward
    if at.mixed:
        window["device"][GRADIENTS] += GRADIENT_BYTES * part
    elif at.optimizer_place != "device":
        if at.accumulates:
            at.always["host"][GRADIENTS] += sum(at.host_bytes(GRADIENT_BYTES * elements) for elements in touching)
    else:
        whole = GRADIENT_BYTES * sum(touching)
        window["device"][GRADIENTS] += whole
        if at.accumulates:  # with one bucket for all its flattened copy is gone by then
            gone = (
                GRADIENT_BYTES * at.weights.trained_elements
                if at.ranks > 1 and at.weights.trained_elements <= at.bucket
                else 0
            )
            at.flush["device"][GRADIENTS] += max(0, whole - gone)
        at.step["device"][BUFFERS] += GRADIENT_BYTES * part


def _stage_1_gradients(at: Layout, trained: int, part: int) -> None:
    """Whole gradients between micro-batches, in float32, and a bucket that stays until the last one; then this rank's
    part is copied.
    """
    touching = sum(_touching(at.trained, part, at.ranks))
    window = at.always if at.accumulates else at.backward
    window["device"][GRADIENTS] += GRADIENT_BYTES * at.weights.trained_elements
    window["device"][BUFFERS] += GRADIENT_BYTES * at.bucket
    flattened = GRADIENT_BYTES * (min(at.bucket, trained) if at.ranks > 1 else 0)
    moved = at.weights.trained_elements if at.optimizer_place == "device" else 0
    at.step["device"][BUFFERS] += flattened + GRADIENT_BYTES * max(0, min(touching, moved) - min(at.bucket, trained))


def _bf16_gradients(at: Layout, trained: int, part: int) -> None:
    """A flat float32 buffer of all gradients for good (_setup_for_real_optimizer), and each micro-batch's in bf16 until
    the next.
    """
    at.always["device"][GRADIENTS] += GRADIENT_BYTES * trained
    (at.always if at.accumulates else at.backward)["device"][GRADIENTS] += at.compute * at.weights.trained_elements
    reduced = at.compute * trained if at.ranks > 1 else 0  # sent in bf16 (engine.py, allreduce_bucket)
    at.step["device"][BUFFERS] += reduced


def _touching(trained: Iterable[Weight], part: int, ranks: int) -> list[int]:
    """Elements of the parameters that a rank's part of the flat buffer touches, for the rank where they are most."""
    sizes: list[list[int]] = [[] for _ in range(ranks)]
    start = 0
    for weight in trained:
        for rank in range(start // part, min(ranks - 1, (start + weight.elements - 1) // part) + 1):
            sizes[rank].append(weight.elements)
        start += weight.elements
    return max(sizes, key=sum)
