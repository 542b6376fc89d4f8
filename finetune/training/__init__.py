"""A recipe run: job, step, loop, run; resume, forecast, verification."""
