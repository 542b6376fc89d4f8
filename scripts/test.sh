#!/usr/bin/env bash
# The test set in the project's own environment.
#   ./scripts/test.sh                      everything, two files of tests at a time
#   ./scripts/test.sh --quick              without the tests marked slow: under 2 minutes
#   ./scripts/test.sh [--quick] ARGS ...   ARGS go to pytest, which then runs one test after the other:
#                                          tests/recipe/test_load.py, -k name, -x ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

selection=()
arguments=()
for argument in "$@"; do
    case "$argument" in
        --quick) selection=(-m "not slow") ;;
        --help | -h) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) arguments+=("$argument") ;;
    esac
done

ensure_environment test
cd "$REPOSITORY"
# One thread per process: most tests start two or more processes, and threads that outnumber the cores only wait.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export FINETUNE_CPU_THREADS="${FINETUNE_CPU_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
# DeepSpeed's compiled ops belong to the environment: two checkouts that share a folder rebuild each other's.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}"
# A file's tests share what its fixtures started, so they stay together.
[ "${#arguments[@]}" -gt 0 ] || arguments=(-n 2 --dist loadfile --no-loadscope-reorder)
exec python -m pytest --durations=20 "${selection[@]}" "${arguments[@]}"
