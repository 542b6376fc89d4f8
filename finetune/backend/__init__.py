"""Everything that knows about devices, DeepSpeed and optional kernels; the rest of the program names none of them."""
