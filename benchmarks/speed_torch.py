"""The side of `speed.py` that computes with torch: a plain loop over diffusers' models, as a process that it starts.

    python benchmarks/speed_torch.py JOB SAMPLES PHOTOS FOLDER [FOLDER]

As diffusers' training scripts do it: images read and put in shape by one loading worker, the frozen encoders on each
batch, scaled dot product attention, fused AdamW. Of SAMPLES, which our preprocessing has written, it takes the tokens.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PriorTransformer, UNet2DConditionModel, VQModel
from peft import LoraConfig
from PIL import Image
from speed_gate import Gate
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

BATCH, THREADS, STEPS = 4, 2, 10_000
RANK, DDIM_STEPS, GUIDANCE, HUBER_C, SCALING = 64, 50, (5.0, 15.0), 0.001, 10.0  # of examples/lcm
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip


class Samples(torch.utils.data.Dataset):
    """Turns through the photographs, more than are asked for, each read and preprocessed whenever it comes."""

    def __init__(self, file, photos, models):
        arrays = dict(np.load(file))
        ours = {name: arrays.pop(name)[0].copy() for name in list(arrays) if "pixel" in name}
        self.arrays, self.photos = arrays, sorted(Path(photos).glob("*.jpg"))
        self.size = ours["pixel_values"].shape[-1] if "pixel_values" in ours else None
        self.processor = None
        if "clip_pixel_values" in ours:
            self.processor = CLIPImageProcessor.from_pretrained(models, subfolder="image_processor")
        for name, pixels in ours.items():  # both sides preprocess alike
            assert np.abs(self[0][name] - pixels).mean() < 0.05, name

    def __len__(self):
        return BATCH * STEPS

    def __getitem__(self, index):
        row = index % len(self.photos)
        sample = {name: array[row] for name, array in self.arrays.items()}
        image = Image.open(self.photos[row]).convert("RGB")
        if self.processor:
            sample["clip_pixel_values"] = self.processor(image, return_tensors="np").pixel_values[0]
        if self.size:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side)).resize((self.size, self.size), Image.BICUBIC)
            sample["pixel_values"] = (np.asarray(square, np.float32) / 127.5 - 1).transpose(2, 0, 1)
        return sample


def frozen(part_class, folder, name):
    return part_class.from_pretrained(folder, subfolder=name).requires_grad_(False).eval()


def noise_of(latents):
    return torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))


class Decoder:
    """Kandinsky 2.2's UNet."""

    def __init__(self, prior, decoder):
        self.movq = frozen(VQModel, decoder, "movq")
        self.image_encoder = frozen(CLIPVisionModelWithProjection, prior, "image_encoder")
        self.model = UNet2DConditionModel.from_pretrained(decoder, subfolder="unet").train()
        self.scheduler = DDPMScheduler.from_pretrained(decoder, subfolder="scheduler")

    def loss(self, batch):
        with torch.no_grad():
            latents = self.movq.encode(batch["pixel_values"]).latents
            embeds = self.image_encoder(batch["clip_pixel_values"]).image_embeds
        noise, times = noise_of(latents)
        noisy = self.scheduler.add_noise(latents, noise, times)
        prediction = self.model(noisy, times, None, added_cond_kwargs={"image_embeds": embeds}).sample[:, :4]
        return torch.nn.functional.mse_loss(prediction, noise)


class Prior:
    """Kandinsky 2.2's prior."""

    def __init__(self, prior, decoder):
        self.image_encoder = frozen(CLIPVisionModelWithProjection, prior, "image_encoder")
        self.text_encoder = frozen(CLIPTextModelWithProjection, prior, "text_encoder")
        self.model = PriorTransformer.from_pretrained(prior, subfolder="prior").train()
        self.model.clip_mean.requires_grad_(False)
        self.model.clip_std.requires_grad_(False)
        self.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")

    def loss(self, batch):
        with torch.no_grad():
            embeds = self.image_encoder(batch["clip_pixel_values"]).image_embeds
            text = self.text_encoder(batch["input_ids"])
            target = (embeds - self.model.clip_mean) / self.model.clip_std
        noise, times = noise_of(target)
        prediction = self.model(
            self.scheduler.add_noise(target, noise, times), times, text.text_embeds, text.last_hidden_state,
            batch["text_mask"].bool(),
        ).predicted_image_embedding  # fmt: skip
        return torch.nn.functional.mse_loss(prediction, target)


class SDXL:
    """Stable Diffusion XL's UNet."""

    def __init__(self, folder):
        self.vae = frozen(AutoencoderKL, folder, "vae")
        self.text_encoder = frozen(CLIPTextModel, folder, "text_encoder")
        self.text_encoder_2 = frozen(CLIPTextModelWithProjection, folder, "text_encoder_2")
        self.model = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    def loss(self, batch):
        with torch.no_grad():
            latents = self.vae.encode(batch["pixel_values"]).latent_dist.mode() * self.vae.config.scaling_factor
            first = self.text_encoder(batch["input_ids"], output_hidden_states=True)
            second = self.text_encoder_2(batch["input_ids_2"], output_hidden_states=True)
            embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        noise, times = noise_of(latents)
        told = {"text_embeds": second[0], "time_ids": batch["time_ids"]}
        noisy = self.scheduler.add_noise(latents, noise, times)
        prediction = self.model(noisy, times, embeds, added_cond_kwargs=told).sample
        return torch.nn.functional.mse_loss(prediction, noise)


class LCMLoRA:
    """Latent consistency distillation of Stable Diffusion into LoRA layers (Luo et al. 2023, arXiv 2311.05556)."""

    def __init__(self, folder):
        self.vae = frozen(AutoencoderKL, folder, "vae")
        self.text_encoder = frozen(CLIPTextModel, folder, "text_encoder")
        self.model = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
        self.model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        self.model.train()
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.times = torch.arange(1, DDIM_STEPS + 1) * (1000 // DDIM_STEPS) - 1
        alphas = self.scheduler.alphas_cumprod
        self.earlier = torch.cat([alphas[:1], alphas[self.times[:-1]]])
        empty = torch.full((1, self.text_encoder.config.max_position_embeddings), self.text_encoder.config.eos_token_id)
        self.nothing = self.text_encoder(empty)[0].detach()

    def answer(self, noisy, times, prompt):
        """The image and the noise that the UNet sees in `noisy`."""
        noise = self.model(noisy, times, prompt).sample
        alpha = self.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        return (noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt(), noise

    def consistent(self, noisy, times, prompt):
        scaled = (SCALING * times).view(-1, 1, 1, 1)
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return skip * noisy + out * self.answer(noisy, times, prompt)[0]

    def loss(self, batch):
        with torch.no_grad():
            latents = self.vae.encode(batch["pixel_values"]).latent_dist.mode() * self.vae.config.scaling_factor
            prompt = self.text_encoder(batch["input_ids"])[0]
        noise, index = torch.randn_like(latents), torch.randint(0, DDIM_STEPS, (len(latents),))
        start, guidance = self.times[index], torch.empty(len(latents), 1, 1, 1).uniform_(*GUIDANCE)
        end = (start - 1000 // DDIM_STEPS).clamp(min=0)
        noisy = self.scheduler.add_noise(latents, noise, start)
        student = self.consistent(noisy, start, prompt)
        with torch.no_grad():
            self.model.disable_adapters()
            pairs = zip(
                self.answer(noisy, start, prompt),
                self.answer(noisy, start, self.nothing.expand_as(prompt)),
                strict=True,
            )
            image, noise = (one + guidance * (one - other) for one, other in pairs)
            self.model.enable_adapters()
            alpha = self.earlier[index].view(-1, 1, 1, 1)
            target = self.consistent(alpha.sqrt() * image + (1 - alpha).sqrt() * noise, end, prompt)
        return (((student - target) ** 2 + HUBER_C**2).sqrt() - HUBER_C).mean()


JOBS = {"decoder": Decoder, "prior": Prior, "sdxl": SDXL, "lcm_lora": LCMLoRA}


def main():
    job, samples, photos, *folders = sys.argv[1:]
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    job = JOBS[job](*folders)
    learning = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=0.0, fused=True)
    gate = Gate()
    gate.wait()
    for batch in torch.utils.data.DataLoader(Samples(samples, photos, folders[0]), BATCH, num_workers=1):
        loss = job.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        gate.after_step()


if __name__ == "__main__":
    main()
