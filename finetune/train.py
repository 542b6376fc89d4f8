"""`accelerate launch finetune/train.py recipe.yaml [key=value ...]`: one rank of a training run."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The launcher puts this folder first on sys.path, where our module names would shadow installed packages and where
    # `import finetune` fails in a checkout that is not installed. The folder above is what belongs there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from finetune.commands.train import run_rank

    run_rank(sys.argv[1:])
