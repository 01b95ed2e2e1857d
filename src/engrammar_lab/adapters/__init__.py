"""What a memory attached to a model brings: SmolLM2-135M taught two small domains, beside LoRA and full tuning."""
