"""What ZeRO's stages ask for when they count a rank's bytes (stages.py), and where they put them. Torch-free."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from finetune.engine.deepspeed.buffers import compute_bytes
from finetune.launch.strategy import Strategy
from finetune.memory.formulas import MOMENTS_BYTES
from finetune.memory.resident import Resident
from finetune.model.parameters import Weight, Weights

MASTER_BYTES = 4  # the float32 copy that the optimizer updates; there is one in float32 runs, too
GRADIENT_BYTES = 4  # a window's gradients are added up in float32 (engine/deepspeed/config.py: grad_accum_dtype)
PARAMETERS, GRADIENTS, STATES, BUFFERS = "parameters", "gradients", "optimizer states", "buffers"
PLACE = {"none": "device", "cpu": "host", "nvme": "nvme"}  # of what a launch file offloads

Places = dict[str, Any]  # {place: Counter of bytes by item}; typed Counters count in whole numbers


def pinned_bytes(size: float) -> int:
    """What torch takes from the system for page-locked memory of `size` bytes: the next power of two
    (ATen/core/CachingHostAllocator.h of torch 2.13, CachingHostAllocatorImpl.allocate), unless PYTORCH_ALLOC_CONF has
    pinned_max_round_threshold_mb."""
    return 1 << (int(size) - 1).bit_length() if size >= 1 else 0


class Layout:
    """A model under a strategy, and the bytes found so far: `always`, what comes on top in the `backward` pass, when a
    bucket of gradients leaves (`flush`) and in the optimizer `step`, the most that is there while the engine starts
    (`load`) and what saving adds (`save`)."""

    def __init__(
        self,
        weights: Weights,
        strategy: Strategy,
        optim: str,
        settings: Mapping[str, int],
        on_cpu: bool,
        accumulates: bool,
    ):
        self.weights, self.strategy, self.settings = weights, strategy, settings
        self.on_cpu, self.accumulates = on_cpu, accumulates
        self.ranks, self.compute = strategy.ranks, compute_bytes(strategy)
        self.mixed = strategy.mixed_precision != "no"
        self.trained = [weight for weight in weights.all if weight.trained]
        self.frozen = [weight for weight in weights.all if not weight.trained]
        self.largest_trained = max((weight.elements for weight in self.trained), default=0)
        self.optimizer_place, self.parameter_place = PLACE[strategy.offload_optimizer], PLACE[strategy.offload_param]
        # bitsandbytes keeps a float32 scale per block of 256 elements of either moment
        self.moments = MOMENTS_BYTES[optim] * (1 + 4 / 256 if "8bit" in optim else 1)
        self.bucket = int(settings["reduce_bucket_size"])
        self.always: Places = defaultdict(Counter)
        self.backward: Places = defaultdict(Counter)
        self.flush: Places = defaultdict(Counter)
        self.step: Places = defaultdict(Counter)
        self.load: Places = defaultdict(Counter)
        self.save: Places = defaultdict(Counter)
        self.always["device"][PARAMETERS] += weights.buffers_bytes

    def host_bytes(self, size: float, section: str = "offload_optimizer") -> float:
        """Bytes of one host tensor of DeepSpeed's that is pinned where the section says so. On a CPU nothing ever is
        (accelerator/cpu_accelerator.py, pin_memory).
        """
        return size if self.on_cpu or not self.settings.get(f"{section}.pin_memory", True) else pinned_bytes(size)

    def stored_bytes(self, weight: Weight) -> float:
        """Bytes of an element of a frozen weight: 4-bit ones stay packed, others are cast (engine.py,
        _cast_module_mixed_precision).
        """
        return self.compute if self.mixed and not weight.quantised else weight.bytes_each

    def result(self, gathered_bytes: float = 0.0, persistent_bytes: float = 0.0) -> Resident:
        """A bucket that holds all gradients leaves when the activations are gone, before the step; others during the
        backward pass. Loading and saving are told whole, with what stays."""
        if self.weights.trained_elements > self.bucket:
            for place, items in self.flush.items():
                self.backward[place] += items
        else:
            self.flush["device"][BUFFERS] += persistent_bytes
            for place, items in self.flush.items():
                self.step[place] = max(self.step[place], items + self.backward[place], key=Counter.total)
        places = ("device", "host")
        if self.on_cpu:  # one memory, counted once
            there, started = self.always["device"] + self.always["host"], self.load["host"]
            load = {"host": max(there, started, key=Counter.total)}
        else:
            load = {place: max(self.always[place], self.load[place], key=Counter.total) for place in places}
        save = {place: self.always[place] + self.save[place] for place in places}

        def positive(part: Places) -> dict[str, dict[str, float]]:
            return {place: dict(+items) for place, items in part.items()}

        return Resident(
            **{place: dict(+self.always[place]) for place in ("device", "host", "nvme")},
            gathered_bytes=gathered_bytes,
            backward=positive(self.backward),
            step=positive(self.step),
            load=positive(load),
            save=positive(save),
        )

    def saving(self, largest_state: float) -> None:
        """A checkpoint copies one device tensor at a time to the host (torch.save), the largest being the float32 copy
        of a part or sub-group. The export gathers the model on rank 0's host, trained weights in float32, parameter by
        parameter (engine/engine.py, full_state_dict)."""
        model = 4.0 * self.weights.trained_elements + sum(w.elements * self.stored_bytes(w) for w in self.frozen)
        self.save["host"][PARAMETERS] += max(
            model, 0 if self.on_cpu or self.optimizer_place != "device" else largest_state
        )
        self.save["device"][BUFFERS] += (
            MASTER_BYTES * self.weights.largest_elements if self.strategy.zero_stage == 3 or self.ranks > 1 else 0
        )
