#!/usr/bin/env bash
# What a reader would otherwise have to look for, in seconds: layout of the code, lint, types.
#   ./scripts/quality.sh          says what is wrong
#   ./scripts/quality.sh --fix    first mends what ruff can mend
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1:-}" in
    "" | --fix) ;;
    *) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac

ensure_environment quality
cd "$REPOSITORY"
if [ "${1:-}" = --fix ]; then
    ruff check --fix --quiet . || true  # what it cannot mend is said below
    ruff format .
fi
status=0
ruff format --check . || status=1
ruff check . || status=1
mypy || status=1
exit "$status"
