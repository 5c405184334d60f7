"""The prior's script on a tiny Kandinsky 2.2: what is its own."""

import ppdiffusers_train  # noqa: F401

import json
import shutil

import numpy as np
import paddle
import pytest
from ppdiffusers import DiffusionPipeline, KandinskyV22CombinedPipeline, UnCLIPScheduler

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws
from tests.conftest import LEVERS, copy_photos, distance, encode, encoded_samples, first_losses, same, scalars, weights


def test_the_guides_snippet_draws_with_the_trained_prior_and_any_decoder(train, kandinsky):
    output_dir = train("prior")
    pipe_prior = DiffusionPipeline.from_pretrained(str(output_dir))
    prior_components = {"prior_" + k: v for k, v in pipe_prior.components.items()}
    pipe = KandinskyV22CombinedPipeline.from_pretrained(str(kandinsky[1]), **prior_components)
    image = pipe(
        prompt="A robot pokemon, 4k photo", negative_prompt="blurry", num_inference_steps=2,
        prior_num_inference_steps=2, height=64, width=64,
    ).images[0]  # fmt: skip
    assert image.size == (64, 64)
    assert same({n: t.numpy() for n, t in pipe.prior_prior.state_dict().items()}, weights(output_dir, "prior"))
    assert isinstance(pipe.prior_scheduler, UnCLIPScheduler), "training's own scheduler cannot sample"


def test_only_the_prior_learns_and_not_its_statistics(train, kandinsky, build):
    before, after = weights(kandinsky[0], "prior"), weights(train("prior"), "prior")
    assert distance(before, after) > 1e-4
    assert same(*({n: w[n] for n in ("clip_mean", "clip_std")} for w in (before, after)))
    module = build("prior")
    own = {id(p) for p in module.prior.parameters()} - {id(module.prior.clip_mean), id(module.prior.clip_std)}
    assert {id(p) for p in module.trainable_parameters()} == own


def test_the_target_is_the_normalised_embedding(build, photos):
    """With a prior that answers zero, the loss is the mean square of the target."""
    module = build("prior")
    encoded = encode(module, build_dataset(module.args), [0, 1, 2])
    with paddle.no_grad():
        module.prior.clip_mean.set_value(paddle.full_like(module.prior.clip_mean, 0.5))
        module.prior.clip_std.set_value(paddle.full_like(module.prior.clip_std, 2.0))
        for parameter in module.prior.proj_to_clip_embeddings.parameters():
            parameter.set_value(paddle.zeros_like(parameter))
    expected = (((encoded["image_embeds"].numpy() - 0.5) / 2) ** 2).mean()
    assert float(module(encoded, Draws(0, [0, 1, 2]))) == pytest.approx(expected, rel=1e-5)


def test_padding_is_masked(build, photos):
    module = build("prior")
    encoded = encode(module, build_dataset(module.args), [0, 1])
    assert 0 < encoded["text_mask"].numpy().sum() < encoded["text_mask"].numpy().size
    loss = float(module(encoded, Draws(0, [0, 1])))
    padding = encoded["text_mask"] == 0
    noise = paddle.ones_like(encoded["prompt_hidden_states"]) * padding.astype("float32").unsqueeze(-1)
    masked = {**encoded, "prompt_hidden_states": encoded["prompt_hidden_states"] + noise}
    assert float(module(masked, Draws(0, [0, 1]))) == loss
    seen = {**masked, "text_mask": paddle.ones_like(encoded["text_mask"])}
    assert float(module(seen, Draws(0, [0, 1]))) != loss


def test_each_flag_of_the_loss_changes_it(build):
    losses = first_losses(lambda *flags: build("prior", *flags), [], *LEVERS)
    assert len({*losses}) == len(losses), losses


@pytest.mark.once
def test_training_overfits_four_photographs(train, build, tmp_path):
    """At fixed draws the loss falls to less than a fifth, and the caption matters."""
    data = f"--train_data_dir={copy_photos(tmp_path / 'four', 4)}"
    flags = ["--max_train_steps=200", "--train_batch_size=4", "--learning_rate=3e-3"]
    out = train("prior", data, *flags, f"--encoded_cache_dir={tmp_path / 'cache'}")
    module = build("prior", data)
    encoded = encode(module, build_dataset(module.args), [0, 1, 2, 3] * 8)
    draws = Draws(99, range(32))
    with paddle.no_grad():
        before = float(module(encoded, draws))
        module.load_weights(str(out))
        after = float(module(encoded, draws))
        names = ("prompt_embeds", "prompt_hidden_states", "text_mask")
        confused = float(module({**encoded, **{name: encoded[name].roll(1, 0) for name in names}}, draws))
    assert after < 0.2 * before, (before, after)
    assert confused > 2 * after, (confused, after)


def captioned(folder, captions):
    """A copy of as many photographs, with these captions."""
    data = copy_photos(folder, len(captions))
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "text": caption}) for row, caption in zip(rows, captions)]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    return data


@pytest.mark.once
def test_of_several_captions_each_sample_draws_one(train, tmp_path):
    data = captioned(tmp_path / "data", [["a", "a long caption"], ["b", "something else"]])
    runs = {
        name: scalars(train("prior", f"--train_data_dir={data}", "--max_train_steps=6", *flags, out=name))
        for name, flags in {"online": [], "cached": [f"--encoded_cache_dir={tmp_path / 'cache'}"]}.items()
    }
    assert runs["online"] == runs["cached"]
    assert len(encoded_samples(tmp_path / "cache")) == 4
    single = captioned(tmp_path / "single", ["a", "b"])
    assert scalars(train("prior", f"--train_data_dir={single}", "--max_train_steps=6", out="s")) != runs["online"]


@pytest.mark.once
def test_long_captions_are_counted(train, tmp_path, capsys):
    data = captioned(tmp_path / "data", ["word " * 30, "short", "x" * 76, "y" * 75])
    train("prior", f"--train_data_dir={data}")
    assert "2 captions are longer than 77 tokens and are truncated, for example that of " in capsys.readouterr().out


@pytest.mark.once
def test_mistakes_get_one_line_and_status_two(train, kandinsky, tmp_path, capsys):
    zero = shutil.copytree(kandinsky[0], tmp_path / "zero")
    file = zero / "prior" / "diffusion_paddle_model.safetensors"
    arrays = weights(zero, "prior")
    file.unlink()
    from safetensors.numpy import save_file

    save_file({**arrays, "clip_std": np.zeros_like(arrays["clip_std"])}, file, metadata={"format": "pd"})
    cases = {
        f"--pretrained_prior_model_name_or_path={zero}": "has a clip_std of 0, which embeddings are divided by",
        f"--train_data_dir={captioned(tmp_path / 'none', ['a', None, 'c'])}": "holds None; expected a text or several",
        f"--train_data_dir={captioned(tmp_path / 'numbers', [1, 2])}": "--caption_column: column 'text' of",
        "--caption_column=caption": "--caption_column: ",
        "--noise_offset=0.1": "--noise_offset is not a flag of this script",
    }
    for flag, expected in cases.items():
        with pytest.raises(SystemExit) as stopped:
            train("prior", flag, "--max_train_steps=3")
        last = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and "error: " in last and expected in last, (flag, last)
