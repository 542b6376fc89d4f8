"""Fine-tuning on Hugging Face Accelerate with exact gradient accumulation."""

__version__ = "0.1.0"
