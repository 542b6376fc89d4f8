"""One file per `finetune` command: arguments, first stage, output."""
