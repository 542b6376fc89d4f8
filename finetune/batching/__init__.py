"""Rows to windows to ranks to micro-batches; batch size and learning rate over the run. Pure."""
