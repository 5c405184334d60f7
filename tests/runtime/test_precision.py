"""Mixed precision, as far as a CPU can tell: Paddle's real loss scaler, and its real `decorate`, made to think that
there is a card. The arithmetic stays float32, so a scaled run must equal an unscaled one to the bit."""

import ppdiffusers_train  # noqa: F401

import math
import sys
from types import SimpleNamespace

import paddle
import pytest

from ppdiffusers_train.runtime import precision
from ppdiffusers_train.runtime.checkpoint import read_state
from ppdiffusers_train.runtime.cpu_levers import VARIABLE
from ppdiffusers_train.runtime.ema import EMA
from ppdiffusers_train.runtime.precision import Precision, in_float32
from tests.conftest import optimizer_state, same, scalars, weights

AUTO_CAST = sys.modules["paddle.amp.auto_cast"]  # its name is that of a function, too
CARD = SimpleNamespace(
    _expected_place=SimpleNamespace(
        is_gpu_place=lambda: True, is_xpu_place=lambda: False, is_custom_place=lambda: False
    )
)


@pytest.fixture
def pretended_card(monkeypatch):
    monkeypatch.setattr(precision, "computes_in_low_precision", lambda: True)
    monkeypatch.setattr("paddle.amp.grad_scaler._dygraph_tracer", lambda: CARD)


UNSCALED = ["--max_train_steps=4", "--checkpointing_steps=2", "--max_grad_norm=0.1"]
FP16 = ["--mixed_precision=fp16", *UNSCALED]


@pytest.fixture
def plain(train):
    return train("prior", *UNSCALED, out="plain")


def test_a_scaled_loss_changes_no_bit_of_what_is_clipped_learned_and_reported(monkeypatch, train, pretended_card):
    """The scale is a power of two. Were the norm taken of scaled gradients, clipping would differ."""
    monkeypatch.setenv(VARIABLE, "none")  # else what is subnormal without the scale would be zero
    plain = train("prior", *UNSCALED, out="plain")
    scaled = train("prior", *FP16, out="scaled")
    assert read_state(scaled / "checkpoint-4")["scaler"]["scale"] == [65536.0]
    assert same(weights(plain, "prior"), weights(scaled, "prior"))
    assert same(*(optimizer_state(out / "checkpoint-4") for out in (plain, scaled)))
    for tag in ("train/loss", "train/gradient_norm"):
        assert scalars(plain, tag) == scalars(scaled, tag)


def overflow_at(monkeypatch, job, call):
    """Make the gradient infinite at a forward pass, counted from 1, as float16 does when the scale is too large."""
    forward, calls = job.KandinskyPriorTrainingModule.forward, []

    def overflowing(self, encoded, draws):
        calls.append(None)
        loss = forward(self, encoded, draws)
        return loss + 1e38 * self.prior.proj_in.bias.sum() * 0.1 if len(calls) == call else loss

    monkeypatch.setattr(job.KandinskyPriorTrainingModule, "forward", overflowing)


def test_a_step_that_overflows_leaves_the_weights_and_halves_the_scale(
    train, kandinsky_jobs, pretended_card, monkeypatch
):
    overflow_at(monkeypatch, kandinsky_jobs["prior"], 3)
    out = train("prior", *FP16, "--checkpointing_steps=1", "--report_to=none")
    states = [read_state(out / f"checkpoint-{step}") for step in (2, 3, 4)]
    assert [state["scaler"]["scale"] for state in states] == [[65536.0], [32768.0], [32768.0]]
    kept = [weights(out / f"checkpoint-{step}", "prior") for step in (2, 3, 4)]
    assert same(kept[0], kept[1]) and not same(kept[1], kept[2])
    assert all(math.isfinite(number) for array in kept[2].values() for number in array.ravel()[:3])


def test_the_scaler_resumes_with_the_scale_it_had(train, kandinsky_jobs, pretended_card, monkeypatch):
    with monkeypatch.context() as patch:
        overflow_at(patch, kandinsky_jobs["prior"], 1)
        out = train("prior", *FP16, "--max_train_steps=2")
    train("prior", *FP16, "--resume_from_checkpoint=latest")
    assert read_state(out / "checkpoint-4")["scaler"]["scale"] == [32768.0]
    assert read_state(out / "checkpoint-4")["scaler"]["incr_count"] == 3


def test_bfloat16_is_not_scaled(pretended_card):
    assert not Precision("bf16").scaler.is_enable() and Precision("fp16").scaler.is_enable()


@pytest.fixture
def lowered(build, monkeypatch):
    """`lowered("prior_lora", "O2", kept=[…])`: the job's module and optimizer with the types they have on a card."""

    def run(name, level, kept=()):
        module = build(name)
        module.overflow_float16 = kept
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=module.trainable_parameters())
        with monkeypatch.context() as patch:
            patch.setattr(precision, "computes_in_low_precision", lambda: True)
            patch.setattr("paddle.amp.grad_scaler._dygraph_tracer", lambda: CARD)
            patch.setattr(AUTO_CAST, "_dygraph_tracer", lambda: CARD)
            patch.setattr(AUTO_CAST, "_is_gpu_float16_supported", lambda: True)
            Precision("fp16", level).lower(module, optimizer)
        return module, optimizer

    return run


def types(model):
    return {str(parameter.dtype).split(".")[-1] for parameter in model.parameters()}


def test_frozen_models_take_the_low_type_unless_they_overflow(lowered):
    module, optimizer = lowered("decoder", "O1", kept=("movq",))
    assert "float16" in types(module.image_encoder)
    assert types(module.movq) == types(module.unet) == {"float32"}
    assert not optimizer._multi_precision


@pytest.mark.parametrize("name, model", [("decoder", "unet"), ("prior", "prior")])
def test_o2_lowers_what_learns_and_has_the_optimizer_keep_masters(lowered, name, model):
    module, optimizer = lowered(name, "O2")
    learning = [parameter for parameter in module.trainable_parameters() if parameter.dtype == paddle.float16]
    assert len(learning) > 0.6 * len(module.trainable_parameters()), "norms stay in float32"
    assert optimizer._multi_precision
    ema = EMA(dict(module.named_parameters()))
    assert {str(average.dtype) for average in ema.averages.values()} == {"paddle.float32"}


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("name", ["decoder_lora", "prior_lora"])
def test_lora_parameters_stay_float32_in_a_low_base(lowered, name, level):
    module, optimizer = lowered(name, level)
    assert {str(parameter.dtype) for parameter in module.trainable_parameters()} == {"paddle.float32"}
    model = module.unet if name == "decoder_lora" else module.prior
    frozen = [parameter for parameter in model.parameters() if parameter.stop_gradient]
    low = sum(parameter.size for parameter in frozen if parameter.dtype == paddle.float16)
    assert low > 0.8 * sum(parameter.size for parameter in frozen)
    assert not optimizer._multi_precision


def test_files_of_low_weights_hold_the_optimizers_masters_and_the_weights_come_back(lowered, tmp_path):
    module, _ = lowered("decoder", "O2")
    weight = module.unet.conv_in.weight
    before = weight.numpy()
    master = paddle.full(weight.shape, 1.0009765625)  # float16 would round it
    with in_float32(module.trainable_parameters(), {weight.name: master}):
        module.save_weights(str(tmp_path))
        assert types(module.unet) == {"float32"}
    saved = weights(tmp_path)
    assert (saved["conv_in.weight"] == 1.0009765625).all() and {str(a.dtype) for a in saved.values()} == {"float32"}
    assert weight is module.unet.conv_in.weight and weight.dtype == paddle.float16
    assert (weight.numpy() == before).all()
