#!/usr/bin/env bash
# Starts this machine's share of a run over several machines: the same command on every one, or one srun task each.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<'TEXT'
usage: scripts/launch_multinode.sh [options] recipe.yaml [key=value ...]

Run it once on every machine. Under SLURM (srun, one task per node) every option has a value already.

  --machines N     number of machines                    (SLURM_JOB_NUM_NODES)
  --rank R         this machine's number, 0 to N-1       (SLURM_NODEID)
  --address HOST   name or address of the machine with rank 0, as the others reach it
                                                         (first host of SLURM_JOB_NODELIST)
  --port P         free port on that machine             (from SLURM_JOB_ID, otherwise 29500)
  --processes N    ranks on each machine                 (SLURM_GPUS_ON_NODE, otherwise the GPUs nvidia-smi lists)
  --config FILE    launch file, or its name in accelerate_configs (multi_node_zero3_offload)
  --dry-run        print the command, start nothing
  --help           this text

Example, two machines of eight GPUs:
  first:   scripts/launch_multinode.sh --machines 2 --rank 0 --address 10.0.0.1 recipes/quickstart/sft.yaml
  second:  scripts/launch_multinode.sh --machines 2 --rank 1 --address 10.0.0.1 recipes/quickstart/sft.yaml

Give output_dir a folder that all machines share. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network card.
TEXT
}

fail() {
    echo "launch_multinode.sh: $*" >&2
    exit 2
}

machines="${SLURM_JOB_NUM_NODES:-}"
rank="${SLURM_NODEID:-}"
address=""
port=""
processes="${SLURM_GPUS_ON_NODE:-}"
config="multi_node_zero3_offload"
dry_run=""

while [ $# -gt 0 ]; do
    case "$1" in
        --machines | --rank | --address | --port | --processes | --config)
            [ $# -ge 2 ] || fail "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        --dry-run) dry_run=1; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        -*) fail "unknown option $1 (see --help)" ;;
        *) break ;;
    esac
done

[ $# -ge 1 ] || fail "no recipe given (see --help)"
[ -f "$1" ] || fail "recipe $1 does not exist (seen from $PWD)"

if [ ! -f "$config" ]; then
    named="$root/accelerate_configs/${config%.yaml}.yaml"
    [ -f "$named" ] || fail "--config $config is neither a file nor a name in $root/accelerate_configs"
    config="$named"
fi
if [ -z "$address" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    address="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
fi
if [ -z "$port" ]; then
    port=29500
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        # Two jobs on one machine must not meet on one port; every machine of a job must arrive at the same.
        port=$((20000 + SLURM_JOB_ID % 10000))
    fi
fi
if [ -z "$processes" ] && command -v nvidia-smi > /dev/null; then
    processes="$(nvidia-smi --list-gpus | grep -c '^GPU' || true)"
fi

for name in machines rank port processes; do
    [ -n "${!name}" ] || fail "--$name is not known: give it, or run under srun"
    [[ "${!name}" =~ ^[0-9]+$ ]] || fail "--$name is '${!name}', not a whole number"
done
[ -n "$address" ] || fail "--address is not known: give it, or run under srun"
[ "$machines" -ge 1 ] && [ "$processes" -ge 1 ] || fail "--machines and --processes must be at least 1"
[ "$rank" -lt "$machines" ] || fail "--rank is $rank, but $machines machines have the ranks 0 to $((machines - 1))"

accelerate="accelerate"
if [ -x "$root/.venv/bin/accelerate" ]; then
    accelerate="$root/.venv/bin/accelerate"
fi

# The launcher "standard" is torchrun on every machine; accelerate's default for DeepSpeed is pdsh over ssh.
command=("$accelerate" launch --config_file "$config"
    --num_machines "$machines" --machine_rank "$rank"
    --main_process_ip "$address" --main_process_port "$port"
    --num_processes "$((machines * processes))" --deepspeed_multinode_launcher standard
    "$root/finetune/train.py" "$@")

if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
