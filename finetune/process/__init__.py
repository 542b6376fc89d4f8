"""How our processes live and end: heartbeat, watchdog, stop signals, root cause, exit status."""
