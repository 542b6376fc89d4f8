"""The GPU suite: what a GPU makes of memory, exactness and throughput, in under ten minutes."""
