"""`python -m finetune`, and `accelerate launch -m finetune ...`."""

from finetune.commands.cli import main

main()
