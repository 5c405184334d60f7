import ppdiffusers_train
import numpy as np, pytest, paddle
from tests.conftest import kept_for_backward
from ppdiffusers_train.models.recompute import recomputes_without_reentrance
def check(b, name, *flags):
    paddle.seed(3)
    def b2(*a):
        m=b(*a); paddle.seed(3); return m
    (plain, expected), (less, gradients) = (kept_for_backward(b2(name, *flags, *flag)) for flag in ([], ["--gradient_checkpointing"]))
    print(name, flags, "kept", plain, less, round(less/plain,3), "diff", max(float(np.abs(a-b).max()) for a,b in zip(expected,gradients,strict=True)), max(float(np.abs(a).max()) for a in expected))
def test_all(build, build_sdxl_module, build_sd3_module, capsys):
    with capsys.disabled():
        check(build, "decoder_lora", "--quantize_base=nf4", "--lora_dropout=0.3")
        check(build_sdxl_module,"lora_sdxl", "--train_text_encoder")
