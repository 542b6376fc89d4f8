"""What offload moves per optimizer step, and how long that takes at a given bandwidth: arithmetic, not measured.
Torch-free.

Read in DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py, swap_tensor/.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from finetune.engine.deepspeed.buffers import PERSISTENT_ELEMENTS, SWAPPED_BYTES
from finetune.launch.strategy import Strategy
from finetune.memory.formulas import MOMENTS_BYTES
from finetune.model.parameters import Weight, Weights

# Assumptions, each about four fifths of what the link can do by its specification (PCI-SIG base specifications 4.0 and
# 5.0: 16 and 32 GT/s per lane, 128b/130b coding, so 31.5e9 and 63e9 bytes per second for 16 lanes each way, 7.9e9 for a
# disk's 4 lanes of 4.0).
PCIE_4_BYTES_PER_SECOND = 25e9
NVME_BYTES_PER_SECOND = 6e9  # one disk, sequential
REUSE_DISTANCE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance


@dataclass(frozen=True)
class Moved:
    """Bytes one rank moves: to the device and to the host over PCIe, and from and to the disk."""

    to_device_bytes: float = 0.0
    to_host_bytes: float = 0.0
    nvme_read_bytes: float = 0.0
    nvme_write_bytes: float = 0.0

    def plus(self, other: Moved, times: float = 1.0) -> Moved:
        """This and `times` the other."""
        return Moved(*(mine + times * theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    @property
    def pcie_bytes(self) -> float:
        return self.to_device_bytes + self.to_host_bytes

    @property
    def nvme_bytes(self) -> float:
        return self.nvme_read_bytes + self.nvme_write_bytes


@dataclass(frozen=True)
class Traffic:
    """What each micro-batch moves, and what each optimizer step moves whatever K is."""

    micro_batch: Moved = Moved()
    step: Moved = Moved()

    def of_step(self, micro_batches: int) -> Moved:
        """A whole step of K micro-batches."""
        return self.step.plus(self.micro_batch, micro_batches)


@dataclass(frozen=True)
class Seconds:
    """How long links are busy if nothing overlaps. Arithmetic at assumed bandwidths, not measured."""

    pcie: float
    nvme: float


def seconds(
    moved: Moved,
    pcie_bytes_per_second: float = PCIE_4_BYTES_PER_SECOND,
    nvme_bytes_per_second: float = NVME_BYTES_PER_SECOND,
    ranks_per_disk: int = 1,
) -> Seconds:
    """Time of what one rank moves; a disk is shared by the ranks of its machine."""
    return Seconds(moved.pcie_bytes / pcie_bytes_per_second, moved.nvme_bytes * ranks_per_disk / nvme_bytes_per_second)


def traffic(
    weights: Weights,
    strategy: Strategy,
    optim: str,
    checkpointing: bool,
    reuse_distance_elements: int = REUSE_DISTANCE_ELEMENTS,
) -> Traffic:
    """What one rank moves under this strategy; nothing without offload.

    ZeRO-1 and 2 with optimizer offload: the window's gradient is added up on the device where they are summed in
    float32 and computed in 16 bits, and goes to the host once (stage_1_and_2.py, copy_grads_in_partition, compact
    buffer); in float32 runs each micro-batch (ZeRO-1: the last one) fetches the host's sum and returns it. The updated
    partition comes back in the compute type. ZeRO-3 with optimizer offload: the float32 sum lives on the host, and each
    micro-batch takes it to the device and back (stage3.py, partition_grads; the first one, too), then the last one
    writes it once more as the optimizer's gradient. Updated weights go to the device only where they live there. With
    optimizer states on NVMe: master, moments and gradient are read, and written, once a step. With parameter offload a
    rank moves its share of what is fetched; the rest comes from the other ranks. On NVMe it reads that share, and
    writes the updated one once a step."""
    compute = 4 if strategy.mixed_precision == "no" else 2
    share = weights.trained_elements / strategy.ranks
    if strategy.zero_stage == 0 or strategy.offload_optimizer == strategy.offload_param == "none":
        return Traffic()
    if strategy.zero_stage < 3:
        if compute == 2:
            return Traffic(step=Moved(to_device_bytes=2 * share, to_host_bytes=4 * share))
        if strategy.zero_stage == 1:
            return Traffic(step=Moved(to_device_bytes=8 * share, to_host_bytes=8 * share))
        return Traffic(Moved(4 * share, 4 * share), Moved(to_device_bytes=0, to_host_bytes=4 * share))
    micro, step = Moved(), Moved()
    if strategy.offload_optimizer != "none":
        micro = Moved(to_device_bytes=4 * share, to_host_bytes=4 * share)
        back = 0 if strategy.offload_param != "none" else compute * share
        step = Moved(to_device_bytes=back, to_host_bytes=4 * share)
    if strategy.offload_optimizer == "nvme":
        states = (4 + MOMENTS_BYTES[optim] + 4) * share
        step = replace(step, nvme_read_bytes=states, nvme_write_bytes=states)
    if strategy.offload_param != "none":
        fetched = fetched_elements(weights, checkpointing, reuse_distance_elements)
        swapped = {w.name for w in weights.all if _is_swapped(w, strategy, compute)}
        read = sum(count for name, count in fetched.items() if name in swapped) * compute / strategy.ranks
        written = sum(w.elements for w in weights.all if w.trained and w.name in swapped) * compute / strategy.ranks
        micro = micro.plus(
            Moved(to_device_bytes=sum(fetched.values()) * compute / strategy.ranks, nvme_read_bytes=read)
        )
        persistent = (
            sum(w.elements for w in weights.all if w.elements <= PERSISTENT_ELEMENTS) * compute / strategy.ranks
        )
        step = step.plus(Moved(to_device_bytes=persistent, nvme_write_bytes=written))
    return Traffic(micro, step)


def fetched_elements(
    weights: Weights,
    checkpointing: bool,
    reuse_distance_elements: int = REUSE_DISTANCE_ELEMENTS,
    persistent_elements: int = PERSISTENT_ELEMENTS,
) -> dict[str, int]:
    """Elements that a micro-batch under ZeRO-3 with parameter offload fetches, all ranks together, by weight.

    A module's weights are fetched when it runs forward or backward, and with gradient checkpointing once more when its
    layer is recomputed; they stay where the module runs again within `reuse_distance_elements`
    (partitioned_param_coordinator.py, __params_to_release). That recomputation ends inside the layer's last module,
    whose weights stay, is torch's doing (early stop). Weights below the persistence threshold stay always. An upper
    bound: prefetching keeps more, at most stage3_max_live_parameters elements; without it, real counts are these.
    Modules are taken to run in the order of their weights, tied ones once."""
    modules: dict[str, list[Weight]] = {}
    for weight in weights.all:
        modules.setdefault(weight.name.rpartition(".")[0], []).append(weight)
    sizes = {name: sum(w.elements for w in group) for name, group in modules.items()}
    uses = _order_of_use(modules, checkpointing, {name for name, size in sizes.items() if size > persistent_elements})
    held: set[str] = set()
    fetches = dict.fromkeys(modules, 0)
    for i, (name, stays) in enumerate(uses):
        fetches[name] += name not in held
        held.add(name)
        if not stays and not _again_within(name, uses, i + 1, sizes, reuse_distance_elements):
            held.remove(name)
    return {
        w.name: fetches[name] * w.elements
        for name, group in modules.items()
        for w in group
        if w.elements > persistent_elements
    }


def _order_of_use(modules: dict[str, list[Weight]], checkpointing: bool, large: set[str]) -> list[tuple[str, bool]]:
    """(module, whether its weights surely stay) of one forward and backward."""
    forward = list(modules)
    uses = [(name, False) for name in forward]
    if not checkpointing:
        return uses + [(name, False) for name in reversed(forward)]
    runs: list[tuple[int | None, list[str]]] = []  # modules of one layer that follow each other
    for name in forward:
        layer = modules[name][0].layer
        if runs and layer is not None and runs[-1][0] == layer:
            runs[-1][1].append(name)
        else:
            runs.append((layer, [name]))
    for layer, names in reversed(runs):
        if layer is not None:
            # norms are listed last, and are not
            last = next((name for name in reversed(names) if name in large), names[-1])
            uses += [(name, name == last) for name in names]
        uses += [(name, False) for name in reversed(names)]
    return uses


def _again_within(name: str, uses: list[tuple[str, bool]], start: int, sizes: dict[str, int], distance: int) -> bool:
    passed = 0
    for following, _ in uses[start:]:
        if passed >= distance:
            return False
        if following == name:
            return True
        passed += sizes[following]
    return False


def _is_swapped(weight: Weight, strategy: Strategy, compute_bytes: int) -> bool:
    return strategy.offload_param == "nvme" and ceil(weight.elements / strategy.ranks) * compute_bytes >= SWAPPED_BYTES


def _values(moved: Moved) -> tuple[float, ...]:
    return moved.to_device_bytes, moved.to_host_bytes, moved.nvme_read_bytes, moved.nvme_write_bytes
