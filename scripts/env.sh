# Sourced by the other scripts: gives the repository an environment with the tested versions.
#
#   ensure_environment [EXTRA ...]   makes .venv when missing, installs when setup.cfg or constraints.txt changed or an
#                                    EXTRA (a group of setup.cfg, such as "test") is not there, puts .venv/bin on PATH.
# FINETUNE_VENV names another folder for the environment.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${FINETUNE_VENV:-$REPOSITORY/.venv}"

say() { printf '\n== %s\n' "$*"; }
fail() { printf '%s\n' "$*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "No Python 3.11 or newer was found on PATH. On Debian and Ubuntu: sudo apt-get install python3-venv"
}

make_venv() {
    local python
    python="$(find_python)"
    say "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" && return
    rm -rf "$VENV"  # half an environment: the interpreter without pip
    "$python" -m virtualenv "$VENV" && return
    fail "$python cannot make a virtual environment. On Debian and Ubuntu: sudo apt-get install python3-venv" \
        "- elsewhere: $python -m pip install --user virtualenv - then call this script again."
}

install_packages() {
    local extras="$1"
    say "installing the tested versions (the first time takes minutes: PyTorch is large)"
    (cd "$REPOSITORY" && "$VENV/bin/python" -m pip install --quiet -e ".${extras:+[$extras]}" -c constraints.txt) ||
        fail "The installation failed; the message above says why. Nothing was run."
    command -v g++ >/dev/null || command -v c++ >/dev/null ||
        echo "note: no C++ compiler found. DeepSpeed's CPU offload needs one: it compiles its optimizer at first use."
}

ensure_environment() {
    local stamp="$VENV/.finetune-installed" wanted extras
    [ -x "$VENV/bin/python" ] || make_venv
    # Groups that are there stay: what is installed anew must suit them all.
    extras="$(sed -n 's/.*\[\(.*\)\]$/\1/p' "$stamp" 2>/dev/null || true)"
    extras="$(printf '%s\n' ${extras//,/ } "$@" | sed '/^$/d' | sort -u | paste -sd,)"
    # The checkout's place belongs to it: an editable install of a moved repository points nowhere.
    wanted="$(cd "$REPOSITORY" && { pwd; cat setup.cfg pyproject.toml constraints.txt; } | cksum) [$extras]"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        install_packages "$extras"
        printf '%s\n' "$wanted" >"$stamp"
    fi
    export PATH="$VENV/bin:$PATH"
}
