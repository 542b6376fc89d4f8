"""DeepSpeed: its configuration, buffers, parameters, checkpoints and compiled ops."""
