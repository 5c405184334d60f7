"""The libraries that LoRA files are written for. Nothing heavy is imported here: the command line reads their names."""

FILES = {
    "ppdiffusers": "paddle_lora_weights.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "kohya": "lora.safetensors",
}
# Files that the PEFT library writes, which are only read.
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
