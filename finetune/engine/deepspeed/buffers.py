"""DeepSpeed's buffer sizes for a model and a strategy: large models start, small ones need no gigabytes. Torch-free.

The sizes depend on the model and the strategy alone: ZeRO-3 writes checkpoints sub-group by sub-group,
so a resumed run must come to the same sizes. Sources are files of DeepSpeed 0.19.8 below deepspeed/runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.launch.strategy import Strategy
from finetune.model.parameters import Weights

# Elements that travel at once: 100 MB in bf16, four times what torch's DDP takes for its buckets. DeepSpeed's 5e8 are 1
# GB, and twice that while a bucket is flattened.
BUCKET_ELEMENTS = 50_000_000
LIVE_BYTES = 2 * 10**9  # of gathered parameters: DeepSpeed's 1e9 elements in 16 bits, and not twice as much in float32
# An optimizer step goes from one sub-group to the next. DeepSpeed's 1e9 elements are 4 GB of float32 gradients on the
# device, or four pinned buffers of 4 GB each with NVMe; a tenth is still hundreds of megabytes per call, read or write.
SUB_GROUP_ELEMENTS = 100_000_000
PERSISTENT_ELEMENTS = 100_000  # DeepSpeed's: parameters up to this size stay whole on every device
# DeepSpeed's: of those that are offloaded to NVMe, so many elements have a copy in host memory
PARAMETERS_ON_HOST = 10**9
# smaller tensors stay in host memory (swap_tensor/constants.py and utils.py: MIN_AIO_BYTES, block_size)
SWAPPED_BYTES = 2**20
PARAMETER_BUFFERS, OPTIMIZER_BUFFERS = 5, 4  # DeepSpeed's; an optimizer needs master, two moments and gradient at once


def compute_bytes(strategy: Strategy) -> int:
    """Bytes of an element of the weights that forward and backward use."""
    return 4 if strategy.mixed_precision == "no" else 2


def derive_settings(weights: Weights, strategy: Strategy) -> dict[str, int]:
    """Keys of DeepSpeed's `zero_optimization` and their values, in elements; a dot leads into an offload section.

    - reduce_bucket_size, allgather_bucket_size (zero/stage_1_and_2.py: the latter must be even; with
      all_gather_into_tensor, which NCCL and gloo have, nothing is allocated for it: utils.py, all_gather_dp_groups).
    - stage3_prefetch_bucket_size, stage3_max_live_parameters: every module fetches so many elements ahead, again and
      again, until the live ones reach the limit (zero/partitioned_param_coordinator.py, fetch_sub_module). So the limit
      is what the device holds; two of the largest parameters and a bucket must go in, or nothing is fetched while
      another is computed with.
    - stage3_max_reuse_distance: what is used again within so many elements is not released. 0 with parameters on NVMe,
      where everything not released keeps one of the few swap buffers ("Not enough buffers":
      swap_tensor/partitioned_param_swapper.py, swap_in).
    - offload_param.buffer_size must hold the largest partition ("More elements than buffer size", get_buffer in the
      same file): DeepSpeed's 1e8 is less than the embedding of a 7B model on one rank. buffer_count: a module's
      parameters are read at once.
    - sub_group_size: see above.
    """
    largest = max(1, weights.largest_elements)
    bucket = max(2, min(weights.trained_elements, BUCKET_ELEMENTS))
    settings = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket + bucket % 2}
    if strategy.zero_stage == 3:
        prefetch = min(weights.elements, BUCKET_ELEMENTS)
        live = max(LIVE_BYTES // compute_bytes(strategy), 2 * largest + prefetch)
        settings |= {
            "stage3_prefetch_bucket_size": prefetch,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": 0 if strategy.offload_param == "nvme" else live,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "sub_group_size": SUB_GROUP_ELEMENTS,
        }
    for section, target in (
        ("offload_optimizer", strategy.offload_optimizer),
        ("offload_param", strategy.offload_param),
    ):
        if target != "none":
            settings[f"{section}.pin_memory"] = True  # copies over PCIe that do not wait; on a CPU nothing is pinned
    if strategy.offload_param == "nvme":
        settings["offload_param.buffer_size"] = -(-largest // strategy.ranks)
        together = max(map(len, modules(weights).values()), default=0)
        settings["offload_param.buffer_count"] = max(PARAMETER_BUFFERS, 2 + together)
        settings["offload_param.max_in_cpu"] = PARAMETERS_ON_HOST
    if strategy.offload_optimizer == "nvme":
        settings["offload_optimizer.buffer_count"] = OPTIMIZER_BUFFERS
    return settings


def modules(weights: Weights) -> dict[str, list[int]]:
    """Elements of the parameters of each module that has any, in their order."""
    found: dict[str, list[int]] = {}
    for weight in weights.all:
        found.setdefault(weight.name.rpartition(".")[0], []).append(weight.elements)
    return found


def fill_in(zero_optimization: dict[str, Any], settings: Mapping[str, int]) -> None:
    """Write settings into DeepSpeed's section, in place; what is there already stands."""
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (zero_optimization.setdefault(section, {}) if section else zero_optimization).setdefault(name, value)
