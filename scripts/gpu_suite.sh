#!/usr/bin/env bash
# Memory, exactness and throughput on this machine's GPU, in under ten minutes; installs and downloads nothing.
#   scripts/gpu_suite.sh [--out FOLDER] [--only NAMES] [--minutes 9]     gpu_suite.json and gpu_suite.md in FOLDER (docs/benchmarks)
#   scripts/gpu_suite.sh --cpu-small --out FOLDER                        the same code with tiny models on the CPU
#   PYTHON=/path/to/python scripts/gpu_suite.sh                          another interpreter than `python`
# GPU_SUITE_COMMIT: the commit to name where the checkout is a copy without its .git
set -euo pipefail
REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m scripts.benchmarks.gpu_suite.run "$@"
