"""Qwen-Image's VAE for images. It was made for videos: its convolutions are three-dimensional, and look back in time. A
single frame has nothing but zeros before it, so a kernel's last slice in time is all that it meets, and a
two-dimensional network with these slices computes the same."""

import paddle
from paddle import nn
from paddle.nn import functional
from ppdiffusers import ConfigMixin, ModelMixin
from ppdiffusers.configuration_utils import register_to_config

from ppdiffusers_train.models.attention import attention
from ppdiffusers_train.tensor_files import Computed, as_array

VERSION = 1  # raised when its functions change encoded samples


class AutoencoderKLQwenImage(ModelMixin, ConfigMixin):
    """Images to latents and back. Names are those of diffusers' class, without the layers that only see videos.

    Args:
        latents_mean, latents_std: of each latent channel: the diffusion transformer has latents with mean 0 and
            standard deviation 1.
        attn_scales: must be empty, as published.
    """

    @register_to_config
    def __init__(
        self, base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, attn_scales=(),
        temperal_downsample=(False, True, True), dropout=0.0, input_channels=3, latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
    ):  # fmt: skip
        super().__init__()
        if attn_scales:
            raise ValueError(f"attn_scales: {attn_scales}; expected [], as in the published VAE")
        if not len(latents_mean) == len(latents_std) == z_dim:
            raise ValueError(f"latents_mean, latents_std: expected {z_dim} numbers each, as many as z_dim")
        self.encoder = Encoder(base_dim, 2 * z_dim, dim_mult, num_res_blocks, input_channels)
        self.quant_conv = nn.Conv2D(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = nn.Conv2D(z_dim, z_dim, 1)
        self.decoder = Decoder(base_dim, z_dim, dim_mult, num_res_blocks, input_channels)

    def encode(self, pixels):
        """Pixels [B, 3, H, W] in [-1, 1] -> the mean of the latents' distribution, normalised: [B, z_dim, h, w]."""
        mean, _ = self.quant_conv(self.encoder(pixels)).chunk(2, axis=1)
        return (mean - self.per_channel("latents_mean")) / self.per_channel("latents_std")

    def decode(self, latents):
        """The reverse of `encode`, with pixels cut to [-1, 1]."""
        latents = latents * self.per_channel("latents_std") + self.per_channel("latents_mean")
        return self.decoder(self.post_quant_conv(latents)).clip(-1, 1)

    def per_channel(self, name: str):
        """A setting with a number for each latent channel, [1, z_dim, 1, 1]."""
        return paddle.to_tensor(list(self.config[name]), "float32").reshape([1, -1, 1, 1])

    def adapt_published(self, tensors: dict) -> None:
        """Turn a file's tensors for videos into those for images."""
        own = self.state_dict()
        for name in list(tensors):
            tensor = tensors[name]
            if ".time_conv." in name:
                del tensors[name]
            elif len(tensor.shape) == 5:
                tensors[name] = last_slice(tensor)
            elif name in own and name.endswith(".gamma"):
                tensors[name] = flat(tensor)


def last_slice(kernel) -> Computed:
    """The last slice in time of a kernel [O, I, T, h, w]."""
    shape = [*kernel.shape[:2], *kernel.shape[3:]]
    return Computed(kernel.dtype, shape, lambda: as_array(kernel)[:, :, -1])


def flat(tensor) -> Computed:
    """A tensor [C, 1, …] as [C]."""
    return Computed(tensor.dtype, tensor.shape[:1], lambda: as_array(tensor).reshape(-1))


class ChannelNorm(nn.Layer):
    """x / |x| · sqrt(C) · gamma, over the channels of [B, C, H, W]."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = self.create_parameter([channels], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x):
        return functional.normalize(x, axis=1) * (x.shape[1] ** 0.5) * self.gamma.reshape([1, -1, 1, 1])


class ResidualBlock(nn.Layer):
    """Two convolutions and a shortcut. [B, C, H, W] -> [B, outgoing, H, W]."""

    def __init__(self, incoming, outgoing):
        super().__init__()
        self.norm1 = ChannelNorm(incoming)
        self.conv1 = nn.Conv2D(incoming, outgoing, 3, padding=1)
        self.norm2 = ChannelNorm(outgoing)
        self.conv2 = nn.Conv2D(outgoing, outgoing, 3, padding=1)
        self.conv_shortcut = nn.Conv2D(incoming, outgoing, 1) if incoming != outgoing else nn.Identity()

    def forward(self, x):
        hidden = self.conv1(functional.silu(self.norm1(x)))
        return self.conv2(functional.silu(self.norm2(hidden))) + self.conv_shortcut(x)


class AttentionBlock(nn.Layer):
    """Attention of one head between all places of an image. [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2D(channels, 3 * channels, 1)
        self.proj = nn.Conv2D(channels, channels, 1)

    def forward(self, x):
        places = self.to_qkv(self.norm(x)).flatten(2).transpose([0, 2, 1]).unsqueeze(2)  # [B, H · W, one head, 3 C]
        found = attention(*places.chunk(3, axis=-1))
        return self.proj(found.squeeze(2).transpose([0, 2, 1]).reshape(x.shape)) + x


class MiddleBlock(nn.Layer):
    """The network's coarsest part. [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels):
        super().__init__()
        self.attentions = nn.LayerList([AttentionBlock(channels)])
        self.resnets = nn.LayerList([ResidualBlock(channels, channels) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Layer):
    """Half the size, or twice the size with half the channels. The layer's name has the number that files give it."""

    def __init__(self, channels, upwards):
        super().__init__()
        first = nn.Upsample(scale_factor=2, mode="nearest") if upwards else nn.Pad2D([0, 1, 0, 1])
        layer = nn.Conv2D(channels, channels // 2, 3, padding=1) if upwards else nn.Conv2D(channels, channels, 3, 2)
        self.resample = nn.Sequential(first, layer)

    def forward(self, x):
        return self.resample(x)


class Encoder(nn.Layer):
    """Pixels to the parameters of latents' distributions: [B, 3, H, W] -> [B, outgoing, H / 8, W / 8]."""

    def __init__(self, width, outgoing, factors, blocks, incoming):
        super().__init__()
        sizes = [width * factor for factor in (1, *factors)]
        self.conv_in = nn.Conv2D(incoming, sizes[0], 3, padding=1)
        layers = []
        for level, (before, after) in enumerate(zip(sizes[:-1], sizes[1:])):
            layers += [ResidualBlock(after if block else before, after) for block in range(blocks)]
            if level < len(factors) - 1:
                layers.append(Resample(after, upwards=False))
        self.down_blocks = nn.LayerList(layers)
        self.mid_block = MiddleBlock(sizes[-1])
        self.norm_out = ChannelNorm(sizes[-1])
        self.conv_out = nn.Conv2D(sizes[-1], outgoing, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for layer in self.down_blocks:
            x = layer(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid_block(x))))


class UpBlock(nn.Layer):
    """Residual blocks of one size, and the step to the next."""

    def __init__(self, before, after, blocks, is_last):
        super().__init__()
        self.resnets = nn.LayerList([ResidualBlock(after if n else before, after) for n in range(blocks + 1)])
        self.upsamplers = nn.LayerList([] if is_last else [Resample(after, upwards=True)])

    def forward(self, x):
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Decoder(nn.Layer):
    """Latents to pixels: [B, C, h, w] -> [B, outgoing, 8 h, 8 w]."""

    def __init__(self, width, incoming, factors, blocks, outgoing):
        super().__init__()
        sizes = [width * factor for factor in (factors[-1], *reversed(factors))]
        self.conv_in = nn.Conv2D(incoming, sizes[0], 3, padding=1)
        self.mid_block = MiddleBlock(sizes[0])
        self.up_blocks = nn.LayerList(
            [
                UpBlock(before // 2 if level else before, after, blocks, level == len(factors) - 1)
                for level, (before, after) in enumerate(zip(sizes[:-1], sizes[1:]))
            ]
        )
        self.norm_out = ChannelNorm(sizes[-1])
        self.conv_out = nn.Conv2D(sizes[-1], outgoing, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(functional.silu(self.norm_out(x)))
