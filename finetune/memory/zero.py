"""A rank's bytes under DeepSpeed's ZeRO stages, with optimizer states and parameters on device, host or NVMe. Torch-free.

Every term is an allocation in DeepSpeed 0.19.8; file names are below deepspeed/runtime. tests/test_memory_zero.py compares the sums with
the storages of real runs on CPU ranks, where device and host are one memory. What exists only with a GPU (pinned memory rounded up, copies
between host and device) is read in the sources and not measured.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from finetune.launch import Strategy
from finetune.limits import MOMENTS_BYTES
from finetune.memory.weights import Resident, Weight, Weights
from finetune.memory.zero_settings import SWAPPED_BYTES, compute_bytes, modules

MASTER_BYTES = 4  # the float32 copy that the optimizer updates; there is one in float32 runs, too
GRADIENT_BYTES = 4  # a window's gradients are added up in float32 (backend/deepspeed.py: grad_accum_dtype)
ALIGNED_BYTES = 1024  # swap_tensor/constants.py: AIO_ALIGNED_BYTES
PARAMETERS, GRADIENTS, STATES, BUFFERS = "parameters", "gradients", "optimizer states", "buffers"

Places = dict[str, Counter]  # {place: {item: bytes}}


def pinned_bytes(size: float) -> int:
    """What torch takes from the system for page-locked memory of `size` bytes: the next power of two (ATen/core/CachingHostAllocator.h
    of torch 2.13, CachingHostAllocatorImpl.allocate), unless PYTORCH_ALLOC_CONF has pinned_max_round_threshold_mb.
    """
    return 1 << max(0, int(size) - 1).bit_length() if size else 0


def aligned(elements: int, element_bytes: int) -> int:
    """Elements of a swapped tensor, a whole number of I/O blocks (swap_tensor/utils.py, optimizer_utils.py: _io_aligned_numel)."""
    block = ALIGNED_BYTES // element_bytes
    return -(-elements // block) * block


def resident(weights: Weights, strategy: Strategy, optim: str, settings: Mapping[str, int], on_cpu: bool,
             micro_batches: int = 2) -> Resident:  # fmt: skip
    """The bytes of the rank that has most, by item and place.

    `optim` is the recipe's, `settings` those of `derive_settings`, `on_cpu`: no GPU, so that nothing is pinned and torch's AdamW is not
    fused. Windows have `micro_batches` micro-batches: with more than one, their gradients are there during forward passes.
    """
    layout = _Layout(weights, strategy, optim, settings, on_cpu, micro_batches)
    return (_stage_3 if strategy.zero_stage == 3 else _stage_1_and_2)(layout)


class _Layout:
    """What both families of stages ask for."""

    def __init__(self, weights: Weights, strategy: Strategy, optim: str, settings: Mapping[str, int], on_cpu: bool, micro_batches: int):
        self.weights, self.strategy, self.settings, self.on_cpu = weights, strategy, settings, on_cpu
        self.ranks, self.compute = strategy.ranks, compute_bytes(strategy)
        self.mixed = strategy.mixed_precision != "no"
        self.trained = [weight for weight in weights.all if weight.trained]
        self.frozen = [weight for weight in weights.all if not weight.trained]
        self.largest_trained = max((weight.elements for weight in self.trained), default=0)
        self.optimizer_place = {"none": "device"}.get(strategy.offload_optimizer, strategy.offload_optimizer).replace("cpu", "host")
        self.parameter_place = {"none": "device"}.get(strategy.offload_param, strategy.offload_param).replace("cpu", "host")
        # bitsandbytes keeps a float32 scale per block of 256 elements of either moment
        self.moments = MOMENTS_BYTES[optim] * (1 + 4 / 256 if "8bit" in optim else 1)
        # torch's AdamW without fused kernels: a denominator and a quotient of the parameter's size; DeepSpeed's CPU Adam and SGD: none
        self.step_bytes = 8 if optim == "adamw" and on_cpu and strategy.offload_optimizer == "none" else 0
        self.accumulates = micro_batches > 1
        self.bucket = int(settings["reduce_bucket_size"])
        self.always: Places = defaultdict(Counter)
        self.backward: Places = defaultdict(Counter)
        self.step: Places = defaultdict(Counter)
        self.load: Places = defaultdict(Counter)
        self.save: Places = defaultdict(Counter)

    def host_bytes(self, size: float, section: str = "offload_optimizer") -> float:
        """Bytes of one host tensor of DeepSpeed's that is pinned where the section says so."""
        return size if self.on_cpu or not self.settings.get(f"{section}.pin_memory", True) else pinned_bytes(size)

    def stored_bytes(self, weight: Weight) -> float:
        """Bytes of an element of a frozen weight: 4-bit ones stay packed, others are cast (engine.py, _cast_module_mixed_precision)."""
        return self.compute if self.mixed and not weight.quantised else weight.bytes_each

    def result(self, gathered_bytes: float = 0.0) -> Resident:
        self.always["device"][BUFFERS] += self.weights.buffers_bytes
        plain = [{place: {item: size for item, size in items.items() if size > 0} for place, items in part.items()}
                 for part in (self.backward, self.step, self.load, self.save)]  # fmt: skip
        return Resident(dict(self.always["device"]), dict(self.always["host"]), dict(self.always["nvme"]), gathered_bytes, *plain)

    def on_top(self, totals: Mapping[str, float]) -> None:
        """Loading is counted like the other parts, as what comes on top: as much as it is more than what stays."""
        if self.on_cpu:
            totals = {"device": sum(totals.values())}
        for place, total in totals.items():
            there = sum(self.always[place].values()) + (sum(self.always["host"].values()) if self.on_cpu else 0)
            self.load[place][PARAMETERS] += max(0.0, total - there)


def _stage_1_and_2(at: _Layout) -> Resident:
    """ZeRO-1 and 2 (zero/stage_1_and_2.py; ZeRO-1 in bf16 without offload: bf16_optimizer.py).

    Always: the trained weights in one flat buffer, a multiple of 2 x ranks elements, that the module's parameters look into; this rank's
    part of it in float32 with its moments. With offload also the part in 16 bits and its gradient on the host, and a buffer of the
    largest parameter on either side (temp_grad_buffer_for_*_offload). Backward: a bucket (setup_buckets), its flattened copy
    (allreduce_bucket), and in mixed precision a float32 copy of one slice of it (_add_to_grad_partition_buffer).
    """
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
        at.backward["device"][BUFFERS] += compute * (at.bucket + (flattened if at.ranks > 1 or at.mixed else 0))
        if at.mixed:
            at.backward["device"][BUFFERS] += GRADIENT_BYTES * min(at.largest_trained, part)
    # every rank reads the whole model in float32 on the host and casts it there; on the device the weights are flattened beside themselves
    frozen = sum(w.elements * w.bytes_each for w in at.frozen)
    whole = 4.0 * at.weights.trained_elements + frozen
    at.on_top({"host": whole, "device": compute * trained + device[PARAMETERS]} if not at.on_cpu else {"host": whole + compute * trained})
    _saving(at, size)
    return at.result()


def _stage_2_gradients(at: _Layout, part: int) -> None:
    """In mixed precision a flat float32 buffer of this rank's part (_build_compact_grad_partition_buffer), there until the step. In float32
    whole parameters that touch the part: on the device a buffer per micro-batch (copy_grads_in_partition), of which the first is added
    to, and flattened for the step; with offload a tensor per parameter on the host (async_accumulate_grad_in_cpu_via_gpu).
    """
    touching = _touching(at.trained, part, at.ranks)
    window = at.always if at.accumulates else at.backward
    if at.mixed:
        window["device"][GRADIENTS] += GRADIENT_BYTES * part
        at.step["device"][BUFFERS] += at.step_bytes * part
    elif at.optimizer_place != "device":
        if at.accumulates:
            at.always["host"][GRADIENTS] += sum(at.host_bytes(GRADIENT_BYTES * elements) for elements in touching)
    else:
        whole = GRADIENT_BYTES * sum(touching)
        window["device"][GRADIENTS] += whole
        if at.accumulates:
            at.backward["device"][GRADIENTS] += whole
        flat = GRADIENT_BYTES * part
        at.step["device"][BUFFERS] += max(flat, flat - whole + at.step_bytes * part)


def _stage_1_gradients(at: _Layout, trained: int, part: int) -> None:
    """Whole gradients between micro-batches, in float32, and a bucket that stays until the last one; then this rank's part is copied."""
    touching = sum(_touching(at.trained, part, at.ranks))
    window = at.always if at.accumulates else at.backward
    window["device"][GRADIENTS] += GRADIENT_BYTES * at.weights.trained_elements
    window["device"][BUFFERS] += GRADIENT_BYTES * at.bucket
    copied = GRADIENT_BYTES * (min(at.bucket, trained) if at.ranks > 1 else 0)
    if at.optimizer_place != "device":
        at.backward["device"][BUFFERS] += copied
        return
    at.step["device"][BUFFERS] += max(copied, at.step_bytes * part + GRADIENT_BYTES * (part - at.bucket - at.weights.trained_elements
                                                                                        + (touching if at.ranks > 1 else part)))  # fmt: skip


def _bf16_gradients(at: _Layout, trained: int, part: int) -> None:
    """A flat float32 buffer of all gradients for good (_setup_for_real_optimizer), and each micro-batch's in bf16 until the next."""
    at.always["device"][GRADIENTS] += GRADIENT_BYTES * trained
    (at.always if at.accumulates else at.backward)["device"][GRADIENTS] += at.compute * at.weights.trained_elements
    reduced = at.compute * trained if at.ranks > 1 else 0  # sent in bf16 (engine.py, allreduce_bucket)
    at.step["device"][BUFFERS] += max(reduced, at.step_bytes * part)


def _touching(trained: Iterable[Weight], part: int, ranks: int) -> list[int]:
    """Elements of the parameters that a rank's part of the flat buffer touches, for the rank where they are most."""
    sizes: list[list[int]] = [[] for _ in range(ranks)]
    start = 0
    for weight in trained:
        for rank in range(start // part, min(ranks - 1, (start + weight.elements - 1) // part) + 1):
            sizes[rank].append(weight.elements)
        start += weight.elements
    return max(sizes, key=sum)


def _stage_3(at: _Layout) -> Resident:
    """ZeRO-3 (zero/stage3.py): of every parameter a partition of ceil(elements / ranks).

    Trained partitions lie in one flat buffer (defragment; with parameter offload _create_param_groups_fp16_flat_cpu_memory, always
    pinned), frozen ones each for themselves (partition_parameters.py, _partition_param). Adapters are made after zero.Init and stay
    float32. Float32 copy and moments by sub-groups (_create_fp32_partitions; the copy is not pinned), a float32 gradient of all partitions
    (grad_partitions_flat_buffer), with offload a second one (initialize_optimizer_states), and a bucket for good.
    """
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
        at.always["host"][GRADIENTS] += sum(at.host_bytes(GRADIENT_BYTES * group) for group in shard.groups)
    elif place == "nvme":
        # gradients are written, too; four pinned buffers, exactly as large as the largest sub-group (swap_tensor/utils.py)
        at.always["nvme"][GRADIENTS] += flat
        buffers = int(at.settings["offload_optimizer.buffer_count"])
        at.always["host"][BUFFERS] += buffers * 4 * aligned(shard.largest_group, 4)
    else:
        # _prepare_fp32_grad_for_sub_group flattens a sub-group's gradients into a copy
        at.step["device"][BUFFERS] += (GRADIENT_BYTES + at.step_bytes) * shard.largest_group
    at.backward["device"][GRADIENTS] += at.compute * shard.largest_trained_module
    # reduce_scatter_coalesced (comm/coalesced_collectives.py) concatenates a bucket, or one parameter larger than that, and
    # torch.distributed's reduce_scatter of gloo copies it again; the rank's part becomes float32
    reduced = max(min(at.bucket, at.weights.trained_elements), at.largest_trained)
    at.backward["device"][BUFFERS] += at.compute * reduced * (2 if at.on_cpu else 1)
    at.backward["device"][BUFFERS] += GRADIENT_BYTES * -(-reduced // at.ranks) if at.mixed else 0
    # zero.Init makes each parameter whole, then takes its part (partition_parameters.py, _zero_init_param); rank 0 reads the checkpoint
    # through its file's pages, which the kernel can drop (transformers 5.23, _load_state_dict_into_zero3_model)
    at.on_top({"device": at.compute * (shard.all + 2 * at.weights.largest_elements)})
    _saving(at, MASTER_BYTES * shard.largest_group)
    return at.result(_gathered_bytes(at))


class _Shards:
    """Elements of one rank's partitions."""

    def __init__(self, at: _Layout):
        def share(weight: Weight) -> int:
            return -(-weight.elements // at.ranks)

        self.trained_bytes = 4 if at.frozen else at.compute  # with frozen weights the trained ones are adapters
        self.trained, self.frozen = sum(map(share, at.trained)), sum(map(share, at.frozen))
        self.all = self.trained + self.frozen
        self.groups, group = [], 0  # _create_fp16_sub_groups: whole partitions until the size is reached
        for size in map(share, at.trained):
            group += size
            if group >= at.settings["sub_group_size"]:
                self.groups.append(group)
                group = 0
        self.groups += [group] if group else []
        self.largest_group = max(self.groups, default=0)
        self.frozen_sizes = [share(weight) for weight in at.frozen]
        trained = {weight.name for weight in at.trained}
        own = Weights(tuple(w for w in at.weights.all if w.name in trained))
        self.largest_trained_module = max(map(sum, modules(own).values()), default=0)


def _partitions(at: _Layout, shard: _Shards) -> None:
    """Partitions where they lie. On NVMe those of 1 MiB and more; the first of the trained ones, up to max_in_cpu elements, have a copy in
    pinned host memory, the others are read into one of the swap buffers (swap_tensor/partitioned_param_swapper.py)."""
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
    at.always["nvme"][PARAMETERS] += trained + sum(frozen) - sum(small)
    kept = min(shard.trained, int(at.settings["offload_param.max_in_cpu"]))
    size = shard.trained_bytes * kept
    at.always["host"][PARAMETERS] += size if at.on_cpu else pinned_bytes(size)
    buffer = aligned(int(at.settings["offload_param.buffer_size"]), at.compute)
    at.always["host"][BUFFERS] += at.compute * int(at.settings["offload_param.buffer_count"]) * buffer
    if kept < shard.trained:  # what the optimizer step writes back goes through a buffer of a sub-group
        at.always["host"][BUFFERS] += shard.trained_bytes * aligned(shard.largest_group, shard.trained_bytes)


def _gathered_bytes(at: _Layout) -> float:
    """Whole parameters on the device (zero/partitioned_param_coordinator.py, fetch_sub_module).

    Small ones stay whole after their first use (ds_persist). Of the others every module fetches a bucket ahead, until there are
    max_live_parameters; the last one fetched may go beyond. Several at once come in one flat tensor first (partition_parameters.py,
    AllGatherCoalescedHandle.wait). On one rank whose parameters are not offloaded the partition itself is the parameter.
    """
    if at.ranks == 1 and (at.parameter_place == "device" or at.on_cpu):
        return 0.0
    limit = int(at.settings["stage3_param_persistence_threshold"])
    adapter_bytes = 4 if at.frozen else at.compute
    size_of = {weight.name: weight.elements * (adapter_bytes if weight.trained else at.compute) for weight in at.weights.all}
    persistent = sum(size_of[weight.name] for weight in at.weights.all if weight.elements <= limit)
    others = [weight.elements for weight in at.weights.all if weight.elements > limit]
    if not others:
        return float(persistent)
    prefetch, live = int(at.settings["stage3_prefetch_bucket_size"]), int(at.settings["stage3_max_live_parameters"])
    kept = int(at.settings["stage3_max_reuse_distance"]) // 2  # what is near enough to its use in the backward pass
    module = max(map(sum, modules(Weights(tuple(w for w in at.weights.all if w.elements > limit))).values()))
    ahead = 0 if at.parameter_place == "nvme" or not prefetch else live  # those on NVMe are fetched when they are needed
    elements = min(sum(others), max(ahead, kept + module) + max(others))
    flat = min(elements, prefetch + max(others)) if at.ranks > 1 and ahead else 0
    return float(persistent + at.compute * (elements + flat))


def _saving(at: _Layout, largest_state: float) -> None:
    """A checkpoint copies one device tensor at a time to the host (torch.save), the largest being the float32 copy of a part or sub-group.
    The export gathers the model on rank 0's host, trained weights in float32 (backend/engine.py, gather_state), parameter by parameter.
    """
    model = 4.0 * at.weights.trained_elements + sum(w.elements * at.stored_bytes(w) for w in at.frozen)
    at.save["host"][PARAMETERS] += max(model, 0 if at.on_cpu or at.optimizer_place != "device" else largest_state)
    if at.strategy.zero_stage == 3 or at.ranks > 1:
        at.save["device"][BUFFERS] += MASTER_BYTES * at.weights.largest_elements
