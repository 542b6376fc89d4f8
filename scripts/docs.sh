#!/usr/bin/env bash
# The pages of docs/ as a site in site/, from the files of this repository alone: any broken link ends it with status 1.
#   ./scripts/docs.sh             builds site/
#   ./scripts/docs.sh --serve     shows it at http://127.0.0.1:8000 and builds it again when a page changes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_environment docs
cd "$REPOSITORY"
export NO_MKDOCS_2_WARNING=1
case "${1:-}" in
    "") exec python -m mkdocs build --strict --quiet ;;
    --serve) exec python -m mkdocs serve --strict ;;
    *) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
