"""A rank's bytes under ZeRO-3, its parameters on device, host or NVMe (stages.py). File names are below
deepspeed/runtime, 0.19.8. Torch-free.
"""

from __future__ import annotations

from finetune.engine.deepspeed.buffers import SWAPPED_BYTES, modules
from finetune.memory.resident import Resident
from finetune.memory.zero.layout import (
    BUFFERS,
    GRADIENT_BYTES,
    GRADIENTS,
    MASTER_BYTES,
    PARAMETERS,
    STATES,
    Layout,
    pinned_bytes,
)
from finetune.model.parameters import Weight, Weights

ALIGNED_BYTES = 1024  # swap_tensor/constants.py: AIO_ALIGNED_BYTES


def aligned(elements: int, element_bytes: int) -> int:
    """Elements of a swapped tensor, a whole number of I/O blocks (swap_tensor/utils.py, optimizer_utils.py:
    _io_aligned_numel).
    """
    block = ALIGNED_BYTES // element_bytes
    return -(-elements // block) * block


def stage_3(at: Layout) -> Resident:
    """ZeRO-3 (zero/stage3.py): of every parameter a partition of ceil(elements / ranks).

    Trained partitions lie in one flat buffer (defragment; with parameter offload
    _create_param_groups_fp16_flat_cpu_memory, always pinned), frozen ones each for themselves (partition_parameters.py,
    _partition_param). Adapters are made after zero.Init and stay float32. Float32 copy and moments by sub-groups
    (_create_fp32_partitions; the copy is not pinned), a float32 gradient of all partitions
    (grad_partitions_flat_buffer), with offload a second one (initialize_optimizer_states), and a bucket for good."""
    shard = _Shards(at)
    place = at.optimizer_place
    host = "device" if place == "device" else "host"
    _partitions(at, shard)
    at.always["device"][BUFFERS] += at.compute * at.bucket
    flat = GRADIENT_BYTES * shard.trained
    at.always[host][GRADIENTS] += flat if place == "device" else at.host_bytes(flat)
    states = (MASTER_BYTES + at.moments) * shard.trained
    at.always[place][STATES] += states
    if place == "host":
        at.always["host"][GRADIENTS] += sum(at.host_bytes(GRADIENT_BYTES * sum(group)) for group in shard.groups)
    elif place == "nvme":
        # gradients are written, too; four pinned buffers, exactly as large as the largest sub-group
        # (swap_tensor/utils.py)
        at.always["nvme"][GRADIENTS] += flat
        buffers = int(at.settings["offload_optimizer.buffer_count"])
        at.always["host"][BUFFERS] += buffers * 4 * aligned(shard.largest_group, 4)
    else:
        # _prepare_fp32_grad_for_sub_group flattens a sub-group's gradients into a copy
        at.step["device"][BUFFERS] += GRADIENT_BYTES * shard.largest_group
    at.backward["device"][GRADIENTS] += at.compute * shard.largest_trained_module
    # reduce_scatter_coalesced (comm/coalesced_collectives.py) concatenates a bucket, and pads a parameter larger than
    # that if the ranks do not divide it; gloo's reduce_scatter copies for a moment; then the rank's part becomes
    # float32
    bucket = min(at.bucket, at.weights.trained_elements)
    reduced = max(bucket, at.largest_trained)
    at.flush["device"][BUFFERS] += at.compute * (reduced if at.largest_trained % at.ranks else bucket)
    copied = at.compute * reduced if at.on_cpu else 0
    at.flush["device"][BUFFERS] += max(copied, GRADIENT_BYTES * -(-reduced // at.ranks) if at.mixed else 0)
    # zero.Init makes each parameter whole, then takes its part (partition_parameters.py, _zero_init_param); rank 0
    # reads the checkpoint through its file's pages, which the kernel can drop (transformers 5.23,
    # _load_state_dict_into_zero3_model) with parameter offload the parts lie on the host from the start (Init:
    # remote_device), page-locked one by one, or on the disk
    at.load["host" if at.on_cpu else "device"][PARAMETERS] += at.compute * 2 * at.weights.largest_elements
    if at.parameter_place == "device" or at.on_cpu:
        at.load["host" if at.on_cpu else "device"][PARAMETERS] += at.compute * shard.all
    else:
        parts = [at.compute * -(-weight.elements // at.ranks) for weight in at.weights.all]
        kept = parts if at.parameter_place == "host" else [size for size in parts if size < SWAPPED_BYTES]
        at.load["host"][PARAMETERS] += sum(at.host_bytes(size, "offload_param") for size in kept)
    at.saving(MASTER_BYTES * shard.largest_group)
    persistent = _persistent_bytes(at)
    return at.result(persistent + _fetched_bytes(at), persistent)


class _Shards:
    """Elements of one rank's partitions."""

    def __init__(self, at: Layout):
        def share(weight: Weight) -> int:
            return -(-weight.elements // at.ranks)

        self.trained_bytes = 4 if at.frozen else at.compute  # with frozen weights the trained ones are adapters
        self.trained, self.frozen = sum(map(share, at.trained)), sum(map(share, at.frozen))
        self.all = self.trained + self.frozen
        self.groups: list[list[int]] = []  # _create_fp16_sub_groups: whole partitions until the size is reached
        group: list[int] = []
        for size in map(share, at.trained):
            group.append(size)
            if sum(group) >= at.settings["sub_group_size"]:
                self.groups.append(group)
                group = []
        self.groups += [group] if group else []
        self.largest_group = max(map(sum, self.groups), default=0)
        self.frozen_sizes = [share(weight) for weight in at.frozen]
        trained = {weight.name for weight in at.trained}
        own = Weights(tuple(w for w in at.weights.all if w.name in trained))
        self.largest_trained_module = max(map(sum, modules(own).values()), default=0)


def _partitions(at: Layout, shard: _Shards) -> None:
    """Partitions where they lie. On NVMe those of 1 MiB and more; the first of the trained ones, up to max_in_cpu
    elements, have a copy in pinned host memory, the others are read into one of the swap buffers
    (swap_tensor/partitioned_param_swapper.py)."""
    place, trained = at.parameter_place, shard.trained_bytes * shard.trained
    frozen = [at.compute * size for size in shard.frozen_sizes]
    if place == "device":
        at.always["device"][PARAMETERS] += trained + sum(frozen)
        return
    small = frozen if place == "host" else [size for size in frozen if size < SWAPPED_BYTES]
    at.always["host"][PARAMETERS] += sum(at.host_bytes(size, "offload_param") for size in small)
    if place == "host":
        at.always["host"][PARAMETERS] += trained if at.on_cpu else pinned_bytes(trained)
        return
    kept = min(shard.trained, int(at.settings["offload_param.max_in_cpu"]))
    size, offset = shard.trained_bytes * kept, 0
    for group in shard.groups:
        fits = offset + sum(group) <= kept
        offset += sum(group)
        tiny = [shard.trained_bytes * n for n in group if shard.trained_bytes * n < SWAPPED_BYTES]
        at.always["host"][PARAMETERS] += 0 if fits else sum(at.host_bytes(n, "offload_param") for n in tiny)
        at.always["nvme"][PARAMETERS] += shard.trained_bytes * sum(group) - sum(tiny)
    at.always["nvme"][PARAMETERS] += sum(frozen) - sum(small)
    at.always["host"][PARAMETERS] += size if at.on_cpu else pinned_bytes(size)
    buffer = aligned(int(at.settings["offload_param.buffer_size"]), at.compute)
    at.always["host"][BUFFERS] += at.compute * int(at.settings["offload_param.buffer_count"]) * buffer
    if kept < shard.trained:  # what the optimizer step writes back goes through a buffer of a sub-group
        at.always["host"][BUFFERS] += shard.trained_bytes * aligned(shard.largest_group, shard.trained_bytes)


def _gathers(at: Layout) -> bool:
    """On one rank whose parameters are not offloaded the partition itself is the parameter (partition_parameters.py,
    NoGatherHandle).
    """
    return at.ranks > 1 or (at.parameter_place != "device" and not at.on_cpu)


def _persistent_bytes(at: Layout) -> float:
    """Small parameters stay whole after their first use (zero/parameter_offload.py, mark_persistent_parameters)."""
    limit = int(at.settings["stage3_param_persistence_threshold"])
    trained_bytes = 4 if at.frozen else at.compute
    small = [w for w in at.weights.all if w.elements <= limit]
    return float(sum(w.elements * (trained_bytes if w.trained else at.compute) for w in small)) if _gathers(at) else 0.0


def _fetched_bytes(at: Layout) -> float:
    """The others: every module fetches a bucket ahead, until there are max_live_parameters; the last one fetched may go
    beyond.

    zero/partitioned_param_coordinator.py, fetch_sub_module. Several at once come in one flat tensor first
    (partition_parameters.py, AllGatherCoalescedHandle.wait). In the first window also the small ones do."""
    limit = int(at.settings["stage3_param_persistence_threshold"])
    large = Weights(tuple(w for w in at.weights.all if w.elements > limit))
    if not large.all or not _gathers(at):
        return 0.0
    prefetch, live = int(at.settings["stage3_prefetch_bucket_size"]), int(at.settings["stage3_max_live_parameters"])
    kept = int(at.settings["stage3_max_reuse_distance"]) // 2  # what is near enough to its use in the backward pass
    module = max(map(sum, modules(large).values()))
    # those on NVMe are fetched when they are needed
    ahead = 0 if at.parameter_place == "nvme" or not prefetch else live
    elements = min(large.elements, max(ahead, kept + module) + large.largest_elements)
    flat = min(elements, prefetch + large.largest_elements) if at.ranks > 1 and ahead else 0
    return float(at.compute * (elements + flat))
