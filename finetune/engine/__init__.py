"""The verbs of a step under one process, DDP and ZeRO; devices, optimizer, measuring."""
