"""Pipelines of toy models for tests.

Stable Diffusion 1.5 and 3 are built offline in seconds, with all classes and code paths of the published ones.
"""

import json
from pathlib import Path

import paddle
from ppdiffusers import AutoencoderKL, StableDiffusion3Pipeline
from ppdiffusers.transformers import CLIPTextModel, CLIPTextModelWithProjection
from tokenizers import pre_tokenizers

from ppdiffusers_train.models.attention import provide_joint_attention
from ppdiffusers_train.models.qwen_image.text_encoder import QwenTextEncoder
from ppdiffusers_train.models.qwen_image.transformer import QwenImageTransformer2DModel
from ppdiffusers_train.models.qwen_image.vae import AutoencoderKLQwenImage
from ppdiffusers_train.models.weights import save_model, written_tensors
from ppdiffusers_train.tensor_files import write_tensors
from ppdiffusers_train.toy.demo.jobs import SAMPLING
from ppdiffusers_train.toy.models import sd, sd3, sdxl
from ppdiffusers_train.toy.models.clip import text_config
from ppdiffusers_train.toy.models.t5 import build_t5, build_t5_tokenizer
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer


def build_sd(directory, channels=(16, 32), seed=0, prediction_type="epsilon") -> Path:
    """Write a Stable Diffusion pipeline, as the hub has it, and return its folder.

    Args:
        channels: width of the UNet at each resolution, multiples of 16.
        seed: of the random weights.
        prediction_type: of the UNet.
    """
    directory = Path(directory)
    paddle.seed(seed)
    tokenizer = build_tokenizer(directory / "tokenizer")
    scheduler = sdxl.build_scheduler()
    scheduler.register_to_config(prediction_type=prediction_type)
    text_encoder = CLIPTextModel(text_config(tokenizer, sdxl.EMBEDDING, layers=2, heads=2))
    unet = sd.build_unet(channels)
    sd.assemble_pipeline(sdxl.build_vae(), text_encoder, tokenizer, unet, scheduler).save_pretrained(str(directory))
    return directory


def build_sd3(directory, layers=2, seed=0) -> Path:
    """Write an SD3 pipeline, as the hub has it, and return its folder.

    Args:
        layers: of the transformer.
        seed: of the random weights.
    """
    directory = Path(directory)
    provide_joint_attention()
    paddle.seed(seed)
    tokenizers = [build_tokenizer(directory / name) for name in ("tokenizer", "tokenizer_2")]
    tokenizer_3 = build_t5_tokenizer(directory / "tokenizer_3")
    first, second = (
        CLIPTextModelWithProjection(text_config(tokenizers[0], sd3.EMBEDDING, 2, 2, hidden_act=activation))
        for activation in ("quick_gelu", "gelu")
    )
    transformer = sd3.build_transformer(layers)
    StableDiffusion3Pipeline(
        vae=build_sd3_vae(),
        text_encoder=first,
        tokenizer=tokenizers[0],
        text_encoder_2=second,
        tokenizer_2=tokenizers[1],
        text_encoder_3=build_t5(len(tokenizer_3), transformer.config.joint_attention_dim, layers=2, seed=seed),
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=sd3.build_scheduler(),
    ).save_pretrained(str(directory))
    return directory


def build_sd3_vae() -> AutoencoderKL:
    """A VAE that halves the resolution twice, with the published one's shift, scale and lack of quant convolutions."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=sd3.SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_qwen_image(directory, layers=2, seed=0) -> Path:
    """Write a Qwen-Image pipeline, as the hub has it, and return its folder.

    Args:
        layers: of the transformer.
        seed: of the random weights.
    """
    directory = Path(directory)
    paddle.seed(seed)
    tokens = build_qwen_tokenizer(directory / "tokenizer")
    config = {"vocab_size": tokens, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    encoder = QwenTextEncoder(config)
    write_tensors_of_torch(encoder, directory / "text_encoder" / "model.safetensors")
    models = {
        "transformer": QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        ),
        "vae": AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(False, True),
            latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(0.5, 0.6, 0.7, 0.8),
        ),
    }  # fmt: skip
    for name, model in models.items():
        save_model(model, directory / name, "diffusers")
    scheduler = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_image_seq_len": 8192, "max_shift": 0.9}
    files = {
        "text_encoder/config.json": config,
        "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler},
        "model_index.json": {"_class_name": "QwenImagePipeline"},
    }
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    return directory


def write_tensors_of_torch(encoder, file) -> None:
    """Write the text encoder's weights under the names that files of Qwen2.5-VL have."""
    file.parent.mkdir(parents=True)
    tensors = written_tensors(encoder, None, None, for_torch=True)
    write_tensors(file, {f"model.{name}": tensor for name, tensor in tensors.items()}, {"format": "pt"})


def build_qwen_tokenizer(folder) -> int:
    """Write Qwen2's tokenizer with single bytes as its vocabulary; returns the number of tokens."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {token: 256 + n for n, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps(special))
    return len(alphabet) + len(special)


def pretrained_sampling(job) -> dict:
    """Arguments for a call of the pipeline that a job starts from, with as many steps as that needs."""
    return {**SAMPLING, "num_inference_steps": 50} if job.distils else job.sampling
