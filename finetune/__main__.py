"""`python -m finetune`, and `accelerate launch -m finetune ...`."""

from finetune.cli import main

main()
