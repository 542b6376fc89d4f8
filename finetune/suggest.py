"""What a wrong key was probably meant to be: our keys elsewhere, other tools' names, near misses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

# Other tools' names (axolotl, LLaMA-Factory, TRL, torchtune, Hugging Face Trainer) and what they are here. A name with
# a section in front holds in that section only. A value that is not a dotted key of ours is advice in words.
FOREIGN: Mapping[str, str] = {
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_id": "model.name_or_path",
    "pretrained_model_name_or_path": "model.name_or_path",
    "model.path": "model.name_or_path",
    "model.name": "model.name_or_path",
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "torch_dtype": "model.dtype",
    "model_dtype": "model.dtype",
    "quantization_bit": "model.load_in_4bit",
    "use_4bit": "model.load_in_4bit",
    "qlora": "model.load_in_4bit",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "peft_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "lora_modules": "lora.target_modules",
    "datasets": "data.train",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "train_file": "data.train",
    "train_files": "data.train",
    "train_dataset": "data.train",
    "data_path": "data.train",
    "eval_dataset": "data.eval",
    "test_datasets": "data.eval",
    "validation_file": "data.eval",
    "validation": "data.eval",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "validation_split": "data.eval_fraction",
    "test_size": "data.eval_fraction",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "block_size": "data.max_length",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.loss_on",
    "train_on_prompt": "data.loss_on",
    "assistant_only_loss": "data.loss_on",
    "completion_only_loss": "data.loss_on",
    "max_samples": "data.max_rows",
    "max_train_samples": "data.max_rows",
    "num_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "train_epochs": "training.num_train_epochs",
    "max_steps_per_epoch": "training.max_steps",
    "num_steps": "training.max_steps",
    "total_steps": "training.max_steps",
    "train_batch_size": "training.global_batch_size",
    "total_batch_size": "training.global_batch_size",
    "effective_batch_size": "training.global_batch_size",
    "batch_size": "training.global_batch_size (rows per optimizer step) or training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_device_batch_size": "training.per_device_train_batch_size",
    "grad_accum": "training.gradient_accumulation_steps",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "accumulation_steps": "training.gradient_accumulation_steps",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "scheduler": "training.lr_scheduler_type",
    "warmup": "training.warmup_ratio or training.warmup_steps",
    "num_warmup_steps": "training.warmup_steps",
    "optimizer": "training.optim",
    "optimizer_type": "training.optim",
    "betas": "training.adam_beta1 and training.adam_beta2",
    "beta1": "training.adam_beta1",
    "beta2": "training.adam_beta2",
    "eps": "training.adam_epsilon",
    "epsilon": "training.adam_epsilon",
    "gradient_clipping": "training.max_grad_norm",
    "clip_grad_norm": "training.max_grad_norm",
    "max_norm": "training.max_grad_norm",
    "enable_activation_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "random_seed": "training.seed",
    "evals_per_epoch": "evaluation.eval_steps",
    "eval_interval": "evaluation.eval_steps",
    "eval_every": "evaluation.eval_steps",
    "log_interval": "logging.logging_steps",
    "log_every_n_steps": "logging.logging_steps",
    "out_dir": "output_dir",
    "save_dir": "output_dir",
    "output": "output_dir",
    "bf16": "the launch file: mixed_precision: bf16",
    "fp16": "the launch file: mixed_precision: fp16",
    "mixed_precision": "the launch file (accelerate_configs/*.yaml)",
    "deepspeed": "the launch file: accelerate launch --config_file accelerate_configs/zero3_offload.yaml",
    "fsdp": "the launch file, with ZeRO-3: accelerate_configs/zero3.yaml",
    "num_processes": "the launch file (accelerate_configs/*.yaml)",
}

# Keys that are planned but do nothing yet; they do not exist until they work.
LATER = frozenset(
    "model.trust_remote_code model.attn_implementation data.max_dropped_fraction data.streaming training.objective "
    "training.lr_scaling training.reference_batch_size training.pure_bf16 training.deterministic "
    "training.device_memory training.global_batch_tokens accumulation checkpoint logging.report_to include".split()
)


def suggest(section: str, key: str, own: Mapping[str, Iterable[str]]) -> str:
    """A sentence that leads from the unknown `key` of `section` ("" at the top) to the right one.

    `own` maps each section's dotted name to its keys; list items are named `data.train[]`.
    """
    full = f"{section}.{key}" if section else key
    plain = key.strip().lower().replace("-", "_").replace(" ", "_")
    here = list(own.get(section, ()))
    if full in LATER:
        return f"{full} is not available yet; leave it out."
    if plain in here:
        return f"Did you mean {plain}?"
    if f"{section}.{plain}" in FOREIGN:
        return f"Use {FOREIGN[f'{section}.{plain}']}."
    elsewhere = [f"{name}.{plain}" if name else plain for name, keys in own.items() if plain in keys]
    if elsewhere:
        return f"It belongs to {elsewhere[0].rpartition('.')[0] or 'the top level'}: {elsewhere[0]}."
    if plain in FOREIGN:
        return f"Use {FOREIGN[plain]}."
    near = get_close_matches(plain, here, n=1, cutoff=0.7)
    if near:
        return f"Did you mean {near[0]}?"
    dotted = {f"{name}.{k}" if name else k: k for name, keys in own.items() for k in keys}
    far = get_close_matches(plain, list(dotted.values()), n=1, cutoff=0.7)
    if far:
        return f"Did you mean {next(full for full, k in dotted.items() if k == far[0])}?"
    near = get_close_matches(plain, here, n=1, cutoff=0.5)
    if near:
        return f"Did you mean {near[0]}?"
    foreign = get_close_matches(plain, list(FOREIGN), n=1, cutoff=0.85)
    if foreign:
        return f"Use {FOREIGN[foreign[0]]}."
    return f"Keys{f' of {section}' if section else ''}: {', '.join(here)}."


def closest(value: str, choices: Iterable[str]) -> str:
    """` Did you mean x?` for the nearest choice, or an empty string."""
    near = get_close_matches(value.lower(), list(choices), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
