"""The torch side of the comparisons: it writes tiny pipelines with random weights, inputs, and what diffusers makes of
them. It runs in the environment of `make parity-new`, whose libraries do not import beside Paddle's.

    python -m tests.parity_new.torch_side JOB FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

torch.set_num_threads(1)
ALPHABET = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
ALPHABET += [chr(256 + n) for n in range(256 - len(ALPHABET))]  # how byte-level tokenizers write all bytes
MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("Ġ", "s"),
    ("a", "l"),
    ("Ġ", "1"),
    ("Ã", "¼"),
    ("o", "f"),
    ("Ġ", "of"),
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
CAPTIONS = ["a red square", "the size of the world is 1234, isn't it?\n\n  Für <|im_end|> {x} u\u0308", ""]
NEGATIVE = " "
SIZES = [(32, 32), (48, 80), (96, 32)]  # in pixels
MODES = {"alone": 1, "guided": 4.0}
CHANNELS, RANK, TARGETS = 4, 3, ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]
STEPS, SIGMAS = 4, (0.9731, 0.25)


@torch.no_grad()
def randomize(model, seed):
    """Give every parameter a random value far from its initial one; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "gamma")) or "norm_" in name or "layernorm" in name:
            tensor.uniform_(0.7, 1.3, generator=generator)
        elif name.endswith("bias"):
            tensor.uniform_(-0.3, 0.3, generator=generator)
        else:
            tensor.normal_(0, max(1, tensor[:1].numel()) ** -0.5, generator=generator)
    return model.eval()


def build_tokenizer():
    """Qwen2's tokenizer, with a tiny vocabulary."""
    tokens = ALPHABET + ["".join(pair) for pair in MERGES]
    tokenizer = Qwen2Tokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=MERGES)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return tokenizer


def write_tokenizer_parts(tokenizer, folder):
    """The same tokenizer as older files have it."""
    folder.mkdir()
    tokens = ALPHABET + ["".join(pair) for pair in MERGES]
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    (folder / "added_tokens.json").write_text(json.dumps({t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}))


def build_pipeline():
    """A tiny Qwen-Image."""
    tokenizer = build_tokenizer()
    numbers = np.random.default_rng(1)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        },
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2, 2, 3], num_res_blocks=1,
        latents_mean=numbers.normal(size=CHANNELS).round(3).tolist(),
        latents_std=numbers.uniform(0.5, 2, CHANNELS).round(3).tolist(),
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02,
        use_dynamic_shifting=True, time_shift_type="exponential",
    )  # fmt: skip
    pipeline = QwenImagePipeline(
        transformer=randomize(transformer, 1),
        text_encoder=randomize(Qwen2_5_VLForConditionalGeneration(config), 2),
        vae=randomize(vae, 3),
        tokenizer=tokenizer,
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def encoders(pipeline):
    """Tokens, states, latents, and decoded images."""
    found = {}
    for n, caption in enumerate(CAPTIONS):
        text = pipeline.prompt_template_encode.format(caption)
        found[f"tokens {n}"] = torch.tensor(pipeline.tokenizer(text)["input_ids"])
        found[f"states {n}"] = pipeline.encode_prompt(caption)[0]
    found["states"], found["mask"] = pipeline.encode_prompt(CAPTIONS)
    mean, deviation = (
        torch.tensor(pipeline.vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    for height, width in SIZES:
        pixels = normal(2, 3, height, width).clamp(-1, 1)
        latents = pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        found[f"pixels {height} {width}"], found[f"latents {height} {width}"] = pixels, (latents - mean) / deviation
        found[f"decoded {height} {width}"] = pipeline.vae.decode(latents.unsqueeze(2)).sample[:, :, 0]
    return found


def velocity(pipeline, size, states, mask, sigmas, noisy):
    """The transformer's output for latents [B, C, h, w]."""
    grid = (1, size[0] // 16, size[1] // 16)
    packed = pipeline._pack_latents(noisy, len(noisy), CHANNELS, size[0] // 8, size[1] // 8)
    return pipeline.transformer(
        packed, states, mask, timestep=sigmas, img_shapes=[[grid]] * len(noisy), return_dict=False
    )[0]


@torch.no_grad()
def drawn(pipeline):
    """What the pipeline draws."""
    found = {}
    for size in SIZES:
        noise = normal(len(CAPTIONS), size[0] * size[1] // 256, 4 * CHANNELS)
        found[f"noise {size[0]} {size[1]}"] = noise
        for mode, scale in MODES.items():
            options = {"true_cfg_scale": scale, "num_inference_steps": STEPS, "height": size[0], "width": size[1]}
            if mode == "guided":
                options["negative_prompt"] = [NEGATIVE] * len(CAPTIONS)
            for kind in ("latent", "np"):
                images = pipeline(CAPTIONS, latents=noise, output_type=kind, **options).images
                found[f"{mode} {kind} {size[0]} {size[1]}"] = torch.as_tensor(images)
    return found


def training_steps(pipeline, size, count):
    """Loss, velocity, and gradients of all LoRA matrices, for a batch of `count` captions."""
    states, mask = pipeline.encode_prompt(CAPTIONS[:count])
    latents, noise = (normal(count, CHANNELS, size[0] // 8, size[1] // 8, seed=seed) for seed in (11, 12))
    sigmas = torch.tensor(SIGMAS[:count])
    noisy = (1 - sigmas.view(-1, 1, 1, 1)) * latents + sigmas.view(-1, 1, 1, 1) * noise
    target = pipeline._pack_latents(noise - latents, count, CHANNELS, size[0] // 8, size[1] // 8)
    found = velocity(pipeline, size, states, mask, sigmas, noisy)
    loss = torch.nn.functional.mse_loss(found, target)
    pipeline.transformer.zero_grad()
    loss.backward()
    gradients = {f"gradient {n}": p.grad for n, p in pipeline.transformer.named_parameters() if p.requires_grad}
    tensors = {"latents": latents, "noise": noise, "sigmas": sigmas, "velocity": found, "loss": loss, **gradients}
    return {f"{name} of {count} {size[0]} {size[1]}": tensor.detach() for name, tensor in tensors.items()}


def add_lora(pipeline):
    """A LoRA with random matrices on the transformer."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    pipeline.transformer.add_adapter(config)
    for n, (name, parameter) in enumerate(pipeline.transformer.named_parameters()):
        if "lora" in name:
            parameter.data.copy_(normal(*parameter.shape, seed=n) * 0.2)


def write(folder: Path):
    """A pipeline in `folder`/pipeline, a LoRA in `folder`/lora, and all numbers in `folder`/expected.safetensors."""
    pipeline = build_pipeline()
    pipeline.save_pretrained(folder / "pipeline", max_shard_size="200KB")
    write_tokenizer_parts(pipeline.tokenizer, folder / "tokenizer_parts")
    found = {**encoders(pipeline), **drawn(pipeline)}
    add_lora(pipeline)
    for size in SIZES[:2]:
        for count in (1, 2):
            found |= training_steps(pipeline, size, count)
    from peft.utils import get_peft_model_state_dict

    QwenImagePipeline.save_lora_weights(folder / "lora", get_peft_model_state_dict(pipeline.transformer))
    found |= {f"lora {name}": tensor for name, tensor in drawn(pipeline).items()}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "expected.safetensors")


def read_loras(folder: Path):
    """Draw with each LoRA file in `folder`/loras, into `folder`/drawn.safetensors."""
    pipeline = QwenImagePipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    found = {}
    for file in sorted((folder / "loras").glob("*.safetensors")):
        pipeline.load_lora_weights(folder / "loras", weight_name=file.name)
        found |= {f"{file.stem} {name}": tensor for name, tensor in drawn(pipeline).items()}
        pipeline.unload_lora_weights()
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "drawn.safetensors")


PUBLISHED_TEXT_ENCODER = {  # the language model of Qwen2.5-VL-7B-Instruct, at the top of its config.json
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
}  # fmt: skip


def names(folder: Path):
    """Folders of the published sizes with configurations alone, and the names and shapes of all their tensors."""
    with torch.device("meta"):
        models = {
            "transformer": QwenImageTransformer2DModel(),
            "vae": AutoencoderKLQwenImage(),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=PUBLISHED_TEXT_ENCODER)),
        }
    found = {}
    for name, model in models.items():
        (folder / "published" / name).mkdir(parents=True)
        if name == "text_encoder":
            (folder / "published" / name / "config.json").write_text(json.dumps(PUBLISHED_TEXT_ENCODER))
        else:
            model.save_config(folder / "published" / name)
        found[name] = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    (folder / "published" / "names.json").write_text(json.dumps(found))


@torch.no_grad()
def block(folder: Path):
    """A transformer of the published width with one block, and its velocity and gradients for one sample."""
    transformer = QwenImageTransformer2DModel(num_layers=1)
    for n, (_, tensor) in enumerate(sorted(transformer.state_dict().items())):
        tensor.normal_(0, max(1, tensor[:1].numel()) ** -0.5, generator=torch.Generator().manual_seed(n))
    transformer.save_pretrained(folder / "block")
    latents, states, sigmas = normal(1, 24, 64, seed=1), normal(1, 9, 3584, seed=2), torch.tensor([0.625])
    with torch.enable_grad():
        found = transformer(
            latents, states, None, timestep=sigmas, img_shapes=[[(1, 4, 6)]], return_dict=False
        )[0]  # fmt: skip
        found.square().mean().backward()
    layers = {f"gradient {n}": transformer.get_parameter(f"transformer_blocks.0.attn.{n}.weight").grad for n in TARGETS}
    tensors = {"latents": latents, "states": states, "sigmas": sigmas, "velocity": found, **layers}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "block.safetensors")


if __name__ == "__main__":
    {"write": write, "read_loras": read_loras, "names": names, "block": block}[sys.argv[1]](Path(sys.argv[2]))
