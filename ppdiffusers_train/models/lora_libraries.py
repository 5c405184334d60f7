"""The libraries that LoRA files are written for. Nothing heavy is imported here: the command line reads their names."""

FILES = {
    "ppdiffusers": "paddle_lora_weights.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "kohya": "lora.safetensors",
}
# Files that are only read: those of the PEFT library, and what older versions of the libraries write.
PEFT_STEM, PEFT_CONFIG = "adapter_model", "adapter_config.json"
OTHER_FILES = (
    f"{PEFT_STEM}.safetensors", "paddle_lora_weights.pdparams", "pytorch_lora_weights.bin", f"{PEFT_STEM}.bin"
)  # fmt: skip
