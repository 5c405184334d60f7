"""LoRA, ours against torch: the training step of both jobs, and files that open on both sides."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer, StableDiffusionPipeline, UNet2DConditionModel
from ppdiffusers import PriorTransformer as PaddlePrior
from ppdiffusers import UNet2DConditionModel as PaddleUNet
from torch.nn import functional

from ppdiffusers_train.cli import main as convert
from ppdiffusers_train.loop.state import build_training_state
from ppdiffusers_train.models.lora import add_lora, lora_layers, save_lora
from ppdiffusers_train.runtime.distributed import start_ranks
from tests.conftest import KANDINSKY, PHOTOS, load_script
from tests.parity import test_decoder, test_prior
from tests.parity.common import assert_close, our_batch, randomize, torch_part
from tests.parity.torch_kandinsky import WIDTH, save_decoder, save_prior

BATCH, STEPS, RANK, ALPHA = 4, 20, 3, 6.0
JOBS = {name: load_script(KANDINSKY / f"train_text_to_image_{name}_lora.py") for name in ("decoder", "prior")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return save_prior(root / "prior"), save_decoder(root / "decoder", "epsilon")


class Side:
    """One job on both sides, with LoRA of the same initial values."""

    def __init__(self, name, folders, *more):
        flags = [
            f"--pretrained_prior_model_name_or_path={folders[0]}",
            f"--pretrained_decoder_model_name_or_path={folders[1]}",
            *[
                f"--train_data_dir={PHOTOS}",
                "--seed=0",
                "--resolution=64",
                f"--lora_rank={RANK}",
                f"--lora_alpha={ALPHA}",
            ],
            *["--snr_gamma=5", "--learning_rate=1e-3", "--adam_weight_decay=0.01", "--adam_epsilon=1e-5"],
            *more,
        ]
        self.name, self.job = name, JOBS[name]
        args = self.job.build_parser().parse_args(flags)
        self.module = getattr(self.job, f"Kandinsky{name.capitalize()}LoRATrainingModule")(args)
        self.ours = self.module.unet if name == "decoder" else self.module.prior
        if name == "decoder":
            self.theirs, self.encoded = (
                torch_part(UNet2DConditionModel, folders[1], "unet"),
                test_decoder.torch_encoded(folders),
            )
            self.scheduler = DDPMScheduler.from_pretrained(folders[1], subfolder="scheduler")
        else:
            self.theirs, self.encoded = (
                torch_part(PriorTransformer, folders[0], "prior"),
                test_prior.torch_encoded(folders[0]),
            )
        self.lora, self.torch_lora = share_lora(self.ours, self.theirs)

    def draws(self, seed):
        return (test_decoder if self.name == "decoder" else test_prior).recorded_draws(seed)

    def torch_loss(self, draws):
        if self.name == "decoder":
            return test_decoder.torch_loss(self.theirs, self.scheduler, self.encoded, draws, 5.0)
        return test_prior.torch_loss(self.theirs, self.encoded, draws, 5.0)

    def compare(self, pick, tolerance=1e-5):
        """Compare what `pick` takes of every matrix on both sides."""
        ours = {name: (pick(matrix), transposed) for name, (matrix, transposed) in self.lora.items()}
        assert_close(ours, {name: pick(matrix).detach() for name, matrix in self.torch_lora.items()}, tolerance)


def share_lora(ours, theirs):
    """Give the LoRA layers of a Paddle model values that have an effect, and a torch model the same layers.

    Returns:
        `{name: (parameter, whether Paddle stores it transposed)}` of ours, `{name: parameter}` of torch's.
    """
    theirs.requires_grad_(False)
    own, copies, random = {}, {}, np.random.default_rng(3)
    for layer, lora in lora_layers(ours).items():  # B is zero at first, and then A has no gradient
        lora.up.weight.set_value(random.normal(0, 0.02, lora.up.weight.shape).astype(np.float32))
        pair = {f"{layer}.{part}": getattr(lora, part).weight for part in ("down", "up")}
        transposed = lora.down.weight.ndim == 2
        own |= {name: (weight, transposed) for name, weight in pair.items()}
        arrays = [weight.numpy().T if transposed else weight.numpy() for weight in pair.values()]
        copies |= zip(pair, add_torch_lora(theirs.get_submodule(layer), *arrays))
    return own, copies


def add_torch_lora(layer, down, up):
    """W x + (α / r) · B A x, by a hook on a linear layer or a convolution of torch; returns A and B."""
    down, up = (torch.nn.Parameter(torch.tensor(np.ascontiguousarray(array))) for array in (down, up))

    def update(inputs):
        if isinstance(layer, torch.nn.Linear):
            return inputs @ down.T @ up.T
        return functional.conv2d(functional.conv2d(inputs, down, None, layer.stride, layer.padding), up)

    layer.register_forward_hook(lambda layer, inputs, output: output + ALPHA / RANK * update(inputs[0]))
    return down, up


@pytest.fixture(params=["decoder", "prior"])
def side(request, folders):
    return Side(request.param, folders)


def test_loss_and_every_gradient_agree(side):
    draws = side.draws(0)
    loss = side.module(side.module.encode(our_batch(side.module, BATCH)), draws)
    loss.backward()
    reference = side.torch_loss(draws)
    reference.backward()
    assert float(loss) == pytest.approx(reference.item(), rel=1e-5)
    side.compare(lambda matrix: matrix.grad)


def test_weights_agree_after_twenty_steps_of_adamw(side):
    state = build_training_state(side.module, side.module.args, STEPS, BATCH, start_ranks())
    encoded = side.module.encode(our_batch(side.module, BATCH))
    matrices = list(side.torch_lora.values())
    optimizer = torch.optim.AdamW(matrices, lr=1e-3, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)
    for step in range(STEPS):
        loss = side.module(encoded, side.draws(step))
        loss.backward()
        state.take_step(range(step, step + 1), loss.detach())
        side.torch_loss(side.draws(step)).backward()
        torch.nn.utils.clip_grad_norm_(matrices, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    side.compare(lambda matrix: matrix, 1e-4)


# Files.


def torch_answer(net, inputs):
    with torch.no_grad():
        return net(**{name: torch.tensor(value) for name, value in inputs.items()})[0].numpy()


def paddle_answer(net, inputs):
    net.eval()
    with paddle.no_grad():
        return net(**{name: paddle.to_tensor(value) for name, value in inputs.items()}, return_dict=False)[0].numpy()


def make_inputs(shapes):
    random = np.random.default_rng(0)
    inputs = {name: random.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    return {**inputs, "timestep": np.array([7, 400])}


def randomize_lora(net):
    """Give every LoRA of a Paddle model values that change the answer."""
    random = np.random.default_rng(1)
    for lora in lora_layers(net).values():
        lora.up.weight.set_value(random.normal(0, 0.2, lora.up.weight.shape).astype(np.float32))


def sd_unet():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    return randomize(unet, seed=2).eval()


SD_TARGETS = "to_q,to_k,to_v,to_out.0,proj_in,ff.net.0.proj,ff.net.2,conv1,conv_shortcut,downsamplers.0.conv"


def nets(which, folders, tmp_path):
    """(torch model, Paddle model of the same weights, inputs, LoRA targets)."""
    if which == "sd":
        theirs = sd_unet()
        theirs.save_pretrained(tmp_path / "sd")
        ours = PaddleUNet.from_pretrained(str(tmp_path / "sd"), from_diffusers=True)
        shapes = {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, WIDTH)}
        return theirs, ours, make_inputs(shapes), SD_TARGETS
    theirs = torch_part(PriorTransformer, folders[0], "prior")
    ours = PaddlePrior.from_pretrained(folders[0], subfolder="prior", from_diffusers=True)
    shapes = {"hidden_states": (2, WIDTH), "proj_embedding": (2, WIDTH), "encoder_hidden_states": (2, 77, WIDTH)}
    return theirs, ours, make_inputs(shapes), "to_q,to_k,to_v,to_out.0"


def close(one, other):
    return np.abs(one - other).max() < 1e-5 * np.abs(other).max()


@pytest.mark.parametrize("which", ["sd", "prior"])
def test_files_for_diffusers_answer_the_same_there_and_back(which, folders, tmp_path):
    theirs, ours, inputs, targets = nets(which, folders, tmp_path)
    base = paddle_answer(ours, inputs)
    add_lora(ours, targets, RANK, ALPHA)
    randomize_lora(ours)
    expected = paddle_answer(ours, inputs)
    assert close(base, torch_answer(theirs, inputs)) and not close(base, expected)
    save_lora(ours, tmp_path / "torch", "diffusers")
    save_lora(ours, tmp_path / "paddle", "ppdiffusers")
    convert(["convert-lora", str(tmp_path / "paddle"), "--to", "diffusers", "--output", str(tmp_path / "converted")])
    convert(["convert-lora", str(tmp_path / "torch"), "--to", "ppdiffusers", "--output", str(tmp_path / "back")])
    assert (tmp_path / "converted" / "pytorch_lora_weights.safetensors").is_file()
    for folder in ("torch", "converted"):
        theirs = nets(which, folders, tmp_path)[0]
        theirs.load_attn_procs(tmp_path / folder)
        assert close(torch_answer(theirs, inputs), expected), folder
    for folder in ("paddle", "back"):
        fresh = nets(which, folders, tmp_path)[1]
        fresh.load_attn_procs(str(tmp_path / folder))
        assert close(paddle_answer(fresh, inputs), expected), folder


def test_the_kandinsky_unets_file_answers_the_same_in_diffusers(folders, tmp_path):
    flags = ["--lora_target_modules=to_q,add_k_proj,conv1,conv2,conv_shortcut,time_emb_proj", "--save_format=diffusers"]
    side = Side("decoder", folders, *flags)
    inputs = {**make_inputs({"sample": (2, 4, 16, 16)}), "encoder_hidden_states": None}
    embeds = np.random.default_rng(4).standard_normal((2, WIDTH)).astype("float32")
    side.ours.eval()
    with paddle.no_grad():
        condition = {"image_embeds": paddle.to_tensor(embeds)}
        numbers = [paddle.to_tensor(inputs[name]) for name in ("sample", "timestep")]
        expected = side.ours(*numbers, None, added_cond_kwargs=condition).sample.numpy()
    side.module.save_weights(str(tmp_path))  # a checkpoint
    theirs = torch_part(UNet2DConditionModel, folders[1], "unet")
    theirs.load_attn_procs(tmp_path)
    with torch.no_grad():
        condition = {"image_embeds": torch.tensor(embeds)}
        numbers = [torch.tensor(inputs[name]) for name in ("sample", "timestep")]
        answer = theirs(*numbers, None, added_cond_kwargs=condition).sample.numpy()
    assert close(answer, expected)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_kohya_files_answer_the_same_in_diffusers_alpha_included(folders, tmp_path, use_rslora):
    theirs, ours, inputs, targets = nets("sd", folders, tmp_path)
    add_lora(ours, targets, RANK, ALPHA, use_rslora=use_rslora)
    randomize_lora(ours)
    save_lora(ours, tmp_path / "ours", "ppdiffusers")
    file = tmp_path / "kohya.safetensors"
    convert(["convert-lora", str(tmp_path / "ours"), "--to", "kohya", "--output", str(file)])
    state, alphas = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path), weight_name=file.name, unet_config=theirs.config
    )
    assert list(set(alphas.values())) == pytest.approx([ALPHA * RANK**0.5 if use_rslora else ALPHA])
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, theirs)
    assert close(torch_answer(theirs, inputs), paddle_answer(ours, inputs))


def test_a_diffusers_lora_of_another_trainer_loads_in_ppdiffusers(folders, tmp_path):
    """Keys of the peft library, in bfloat16: what `--to ppdiffusers` makes of them answers the same."""
    from safetensors.torch import save_file

    theirs, ours, inputs, _ = nets("sd", folders, tmp_path)
    torch.manual_seed(3)
    arrays = {}
    for name, layer in theirs.named_modules():
        if name.endswith(("to_q", "to_v")):
            arrays[f"unet.{name}.lora_A.weight"] = torch.randn(2, layer.in_features).bfloat16()
            arrays[f"unet.{name}.lora_B.weight"] = (0.3 * torch.randn(layer.out_features, 2)).bfloat16()
    save_file(arrays, tmp_path / "peft.safetensors")
    for name in ("ppdiffusers", "diffusers"):
        convert(["convert-lora", str(tmp_path / "peft.safetensors"), "--to", name, "--output", str(tmp_path / name)])
    ours.load_attn_procs(str(tmp_path / "ppdiffusers"))
    expected = {name: value.float() for name, value in arrays.items()}
    for name, layer in theirs.named_modules():
        if f"unet.{name}.lora_A.weight" in expected:
            pair = [expected[f"unet.{name}.lora_{part}.weight"] for part in "AB"]
            layer.register_forward_hook(lambda layer, inputs, out, pair=pair: out + inputs[0] @ pair[0].T @ pair[1].T)
    assert close(paddle_answer(ours, inputs), torch_answer(theirs, inputs))
