#!/usr/bin/env bash
# From a fresh clone to a tuned model: environment, tiny base model, fine-tuning, answers before and after.
# Under 5 minutes on 2 CPU cores after the installation; uses the GPU when there is one. Call it as often as you like.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ensure_environment
SECONDS=0  # the clock starts after the installation
cd "$REPOSITORY"
use_all_cores

BASE=runs/quickstart-base
RUN=runs/quickstart-sft
RECIPE=recipes/quickstart/sft.yaml
DATA=recipes/quickstart/data
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    LAUNCH=accelerate_configs/single_gpu.yaml
else
    LAUNCH=accelerate_configs/cpu.yaml
fi

# One question of each kind from the held-out chats; no training chat names these functions.
ask() {
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

say "base model: $BASE/model"
python -m scripts.quickstart.tiny_model --output "$BASE" --launch "$LAUNCH"

say "answers before fine-tuning (the base model has only read text, and goes on as it likes)"
ask "$BASE/model"

say "fine-tuning: accelerate launch --config_file $LAUNCH finetune/train.py $RECIPE"
accelerate launch --config_file "$LAUNCH" finetune/train.py "$RECIPE"

say "answers after fine-tuning"
ask "$RUN/model"

say "result"
python - "$RUN/metrics.jsonl" <<'PYTHON'
import json, sys

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
losses = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
(_, first), (step, last) = losses[0], losses[-1]
print(f"held-out loss: {first:.4f} at step 0, {last:.4f} at step {step} ({(last - first) / first:+.1%})")
PYTHON
cat <<TEXT
tuned model:   $RUN/model    (finetune generate $RUN/model "your question")
measurements:  $RUN/metrics.jsonl, $RUN/run.json
recipe:        $RECIPE, as it was run: $RUN/recipe.yaml
base model:    $BASE/model
time:          $SECONDS seconds after the installation
TEXT
