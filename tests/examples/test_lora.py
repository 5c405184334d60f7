"""The LoRA scripts of Kandinsky 2.2: what is their own."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest
from ppdiffusers import KandinskyV22CombinedPipeline

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws
from ppdiffusers_train.models.lora import lora_layers, lora_parameters
from tests.conftest import encode, optimizer_state, same, scalars, tensors, weights

NETS = {"decoder_lora": "unet", "prior_lora": "prior"}
LORA_FILE = "paddle_lora_weights.safetensors"
BOTH = pytest.mark.parametrize("name", list(NETS))


def answer(net, name):
    """The output of a UNet or prior for fixed inputs."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return paddle.to_tensor(random.standard_normal(shape, dtype=np.float32))

    net.eval()
    with paddle.no_grad():
        if name == "decoder_lora":
            conditions = {"image_embeds": normal(2, 64)}
            return net(normal(2, 4, 16, 16), 5, encoder_hidden_states=None, added_cond_kwargs=conditions).sample.numpy()
        return net(normal(2, 64), 5, normal(2, 64), normal(2, 77, 64)).predicted_image_embedding.numpy()


@pytest.fixture(scope="module")
def combined(kandinsky, tmp_path_factory):
    """A function that loads the base model's combined pipeline."""
    prior, decoder = kandinsky

    def load():
        from ppdiffusers import DiffusionPipeline

        components = DiffusionPipeline.from_pretrained(str(prior)).components
        return KandinskyV22CombinedPipeline.from_pretrained(
            str(decoder), **{f"prior_{name}": part for name, part in components.items()}
        )

    return load


@BOTH
def test_load_attn_procs_gives_the_trained_model_alpha_included(train, build, combined, name):
    flags = ["--lora_rank=4", "--lora_alpha=8", "--max_train_steps=6", "--learning_rate=1e-2"]
    flags += ["--use_rslora"] if name == "prior_lora" else []
    output_dir = train(name, *flags, "--checkpointing_steps=6")
    module = build(name, *flags)
    module.load_weights(str(output_dir / "checkpoint-6"))
    trained = answer(getattr(module, NETS[name]), name)
    pipe = combined()
    net = {"decoder_lora": pipe.unet, "prior_lora": pipe.prior_prior}[name]
    base = answer(net, name)
    net.load_attn_procs(str(output_dir))
    loaded = answer(net, name)
    change = np.abs(trained - base).max()
    assert change > 1e-2 and np.abs(loaded - trained).max() < 1e-4 * change
    image = pipe(prompt="a cat", num_inference_steps=2, prior_num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)


@BOTH
def test_only_the_lora_layers_learn_and_the_base_has_no_gradient_and_no_moments(build, train, name):
    module = build(name)
    net = getattr(module, NETS[name])
    own = lora_parameters(net)
    assert {id(p) for p in module.trainable_parameters()} == {id(p) for p in own.values()}
    encoded = encode(module, build_dataset(module.args), [0, 1])
    module.train()
    module(encoded, Draws(0, [0, 1])).backward()
    for parameter in net.parameters():
        assert (parameter.grad is not None) == any(parameter is p for p in own.values())
    state = optimizer_state(train(name, "--checkpointing_steps=2") / "checkpoint-2")
    trained = {key.split("//")[0] for key in state}
    assert trained == {n for n, p in module.named_parameters() if any(p is q for q in own.values())}
    assert all("lora" in key for key in trained)


@BOTH
def test_every_lora_layer_learns(train, name):
    """Also the added ones, where the image enters the decoder: their B leaves zero."""
    arrays = tensors(train(name, "--max_train_steps=3") / LORA_FILE)
    ups = {key: np.abs(array).max() for key, array in arrays.items() if ".up." in key}
    assert min(ups.values()) > 0, ups
    kinds = {key.split(".lora.")[0].split("attn", 1)[-1].split(".", 1)[-1] for key in ups}
    expected = {"to_q", "to_k", "to_v", "to_out.0"} | (
        {"add_k_proj", "add_v_proj"} if name == "decoder_lora" else set()
    )
    assert {next(kind for kind in expected if key.endswith(kind)) for key in kinds} == expected


@BOTH
def test_training_starts_at_the_base_model(train, name):
    full = scalars(train(name.removesuffix("_lora"), "--max_train_steps=1", out="full"))
    assert scalars(train(name, "--max_train_steps=1")) == full


@pytest.mark.once
@BOTH
def test_the_base_model_stays_untouched(train, kandinsky, name):
    folder = {"decoder_lora": kandinsky[1], "prior_lora": kandinsky[0]}[name]
    before = weights(folder, NETS[name])
    assert (train(name) / LORA_FILE).is_file() and same(before, weights(folder, NETS[name]))


@pytest.mark.once
@pytest.mark.parametrize("flag", ["--lora_rank", "--rank"])
def test_the_rank_is_the_inner_size(train, flag):
    arrays = tensors(train("prior_lora", f"{flag}=3", "--max_train_steps=1") / LORA_FILE)
    assert {array.shape[1] for key, array in arrays.items() if ".down." in key} == {3}


@pytest.mark.once
@pytest.mark.parametrize("flag", ["--lora_alpha=1", "--lora_dropout=0.5", "--seed=1"])
def test_each_flag_changes_training(train, flag):
    runs = [scalars(train("prior_lora", *flags, "--max_train_steps=3", out=str(len(flags)))) for flags in ([], [flag])]
    assert runs[0] != runs[1]


@pytest.mark.parametrize("alpha, expected", [([], 4**0.5), (["--lora_alpha=6"], 6 / 4**0.5)])
def test_rslora_divides_by_the_root_of_the_rank(build, alpha, expected):
    layers = lora_layers(build("prior_lora", "--lora_rank=4", "--use_rslora", *alpha).prior)
    assert {lora.network_alpha / lora.rank for lora in layers.values()} == {expected}


def test_dropout_is_off_where_nothing_is_trained(build):
    module = build("prior_lora", "--lora_dropout=0.5")
    with paddle.no_grad():
        for parameter in lora_parameters(module.prior).values():
            parameter.set_value(paddle.ones_like(parameter))
    assert np.array_equal(answer(module.prior, "prior_lora"), answer(module.prior, "prior_lora"))


@pytest.mark.once
def test_target_modules_choose_the_layers(build, train):
    module = build("decoder_lora", "--lora_target_modules=to_q,add_v_proj,conv1")
    names = {layer.split(".")[-1] for layer in lora_layers(module.unet)}
    assert names == {"to_q", "add_v_proj", "conv1"}
    arrays = tensors(train("decoder_lora", "--lora_target_modules=conv1") / LORA_FILE)
    assert all(array.ndim == 4 and ".conv1.lora." in key for key, array in arrays.items()) and arrays


def test_initial_values_have_the_spread_of_one_over_the_rank(build):
    layers = lora_layers(build("decoder_lora", "--lora_rank=8").unet)
    downs = np.concatenate([lora.down.weight.numpy().ravel() for lora in layers.values()])
    assert downs.std() == pytest.approx(1 / 8, rel=0.05) and abs(downs.mean()) < 0.01
    assert all(np.abs(lora.up.weight.numpy()).max() == 0 for lora in layers.values())


def test_save_format_diffusers_writes_torch_layout_which_both_libraries_load(train, combined):
    ours = tensors(train("decoder_lora", "--max_train_steps=3", out="a") / LORA_FILE)
    flags = ["--save_format=diffusers", "--checkpointing_steps=3"]
    folder = train("decoder_lora", "--max_train_steps=3", *flags, out="b")
    for where in (folder, folder / "checkpoint-3"):
        assert not (where / LORA_FILE).exists()
        theirs = tensors(where / "pytorch_lora_weights.safetensors")
        assert same(ours, {key: array.T for key, array in theirs.items()})
        pipe = combined()
        pipe.unet.load_attn_procs(str(where), from_diffusers=True)
        assert same({f"unet.{key}": p.numpy() for key, p in lora_parameters(pipe.unet).items()}, ours)


@pytest.mark.once
def test_mistakes_get_one_line_and_status_two(train, capsys):
    checkpoint = train("prior_lora", "--checkpointing_steps=2", out="rank4") / "checkpoint-2"
    cases = {
        "--lora_rank=0": "--lora_rank/--rank: '0' is not a whole number above 0",
        "--lora_target_modules=to_z": "--lora_target_modules: no layer is called 'to_z'; there are ",
        "--lora_target_modules=,": "--lora_target_modules: ',' names no layer",
        f"--lora_rank=2 --resume_from_checkpoint={checkpoint}": "checkpoint-2 was trained with 4, now it is 2",
        f"--lora_target_modules=to_q --resume_from_checkpoint={checkpoint}": "now it is to_q, which",
    }
    for flags, expected in cases.items():
        with pytest.raises(SystemExit) as stopped:
            train("prior_lora", *flags.split(" "))
        last = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and "error: " in last and expected in last, (flags, last)
