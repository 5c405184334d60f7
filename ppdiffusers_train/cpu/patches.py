"""What makes Paddle's CPU kernels faster, and leaves the results as they are. Nothing here touches a run on a card.

    PPDIFFUSERS_TRAIN_CPU_LEVERS=conv_bias,linear_bias    these two; without the variable, the usual ones
    PPDIFFUSERS_TRAIN_CPU_LEVERS=none                     Paddle as it comes

docs/performance.md has what each of them gains.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import paddle
from paddle import matmul, nn  # a product by its own name: what counts a model's must not count those in here
from paddle.autograd import PyLayer
from paddle.nn import functional

from ppdiffusers_train.cpu import onednn
from ppdiffusers_train.cpu.environment import configured_threads, cpu_vendor
from ppdiffusers_train.cpu.free_memory import return_free_memory
from ppdiffusers_train.cpu.subnormals import flush_subnormals
from ppdiffusers_train.errors import UserError

VARIABLE = "PPDIFFUSERS_TRAIN_CPU_LEVERS"
PATCHES = (
    "no_subnormals", "no_views", "no_same_casts", "onednn_convolutions", "conv_bias", "linear_bias", "image_padding",
    "compiled_encoders",
)  # fmt: skip
# Compiling the encoders costs as much as encoding some dozens of samples. The rule looks at the data alone: a run that
# goes on, or has other cards, encodes as the one before.
COMPILE_FROM_ROWS = 1000


def enabled_patches() -> tuple:
    """The levers that are on: none on a card, else what the environment says.

    Raises:
        UserError: it names another lever.
    """
    if not paddle.get_device().startswith("cpu"):
        return ()
    useless = {"compiled_encoders"} if cpu_vendor() == "AuthenticAMD" else ()  # as fast uncompiled there
    usual = [name for name in PATCHES if name not in useless]
    names = [name.strip() for name in os.environ.get(VARIABLE, ",".join(usual)).split(",")]
    unknown = set(names) - {*PATCHES, "none", ""}
    if unknown:
        raise UserError(f"{VARIABLE}: there is no {min(unknown)!r}; expected some of {', '.join(PATCHES)}, or none")
    return tuple(name for name in PATCHES if name in names)


def apply_patches() -> None:
    """Put the levers that are on in the place of Paddle's functions; once is enough, and more change nothing."""
    on = enabled_patches()
    flush_subnormals("no_subnormals" in on)
    for which, owner, name, replacement_for in replacements():
        original = getattr(owner, name)
        if set(which) & set(on) and not hasattr(original, "replaced"):
            replacement = replacement_for(original, on)
            replacement.replaced = original
            setattr(owner, name, replacement)


def remove_patches() -> None:
    """Put Paddle's own functions back."""
    flush_subnormals(False)
    for _, owner, name, _ in replacements():
        function = getattr(owner, name)
        setattr(owner, name, getattr(function, "replaced", function))


@contextlib.contextmanager
def patched_paddle():
    """The levers are pulled inside, and released at the end, whatever that is."""
    apply_patches()
    try:
        yield
    finally:
        remove_patches()


@contextlib.contextmanager
def no_views():
    """Inside, where the lever is on, a transposed tensor is a new one, its numbers in order, and not a view.

    Attention transposes, and where a product wants the numbers in order, Paddle's kernel for any view copies them one
    by one: 7 ms for what its kernel for transposing does in 0.35. Not for a whole run: without views Paddle has no
    kernel for `Tensor.view` to another type, with which safetensors reads files. A view from outside is refused inside,
    by Paddle 3; 2.6 would read it as if it were none, and gains nothing anyway.
    """
    flag = "FLAGS_use_stride_kernel"
    if "no_views" not in enabled_patches() or not paddle.framework.use_pir_api() or not paddle.get_flags(flag)[flag]:
        yield
        return
    paddle.set_flags({flag: False})
    try:
        yield
    finally:
        paddle.set_flags({flag: True})


def replacements() -> tuple:
    """(the levers it belongs to, where a function of Paddle stands, its name, what makes its replacement)."""
    of_convolution = ("onednn_convolutions", "conv_bias")
    return (
        (of_convolution, functional.conv, "_conv_nd", replacement_for_conv_nd),  # of nn.Conv2D
        (of_convolution, functional, "conv2d", replacement_for_conv2d),  # of ppdiffusers' residual blocks
        (("linear_bias",), functional, "linear", replacement_for_linear),
        (("image_padding",), functional, "pad", replacement_for_pad),
        (("no_same_casts",), paddle.Tensor, "cast", replacement_for_cast),
    )


def convolution(on, original, x, weight, bias, stride, *options):
    """One of Paddle's functions for convolutions in two dimensions, as the levers want it.

    Paddle adds the bias as [1, C, 1, 1], for which its CPU kernels, of the sum and of the bias' gradient, work out the
    place of each number by itself; with fewer dimensions than the other side they go through whole planes. The same
    bits.
    """
    by_onednn = "onednn_convolutions" in on and paddle.framework.use_pir_api() and onednn.pays(x, weight, stride)
    if by_onednn:
        y = onednn.Convolution.apply(x, weight, original, stride, *options)
    elif bias is None or "conv_bias" not in on:
        return original(x, weight, bias, stride, *options)
    else:
        y = original(x, weight, None, stride, *options)
    return y if bias is None else y + bias.reshape([-1, 1, 1])


def replacement_for_conv_nd(original, on):
    """Paddle's function behind its layers of convolution, by `convolution`."""

    def conv_nd(
        x, weight, bias=None, stride=1, padding=0, padding_algorithm=None, dilation=1, groups=1, data_format="NCHW",
        channel_dim=1, op_type="conv2d", use_cudnn=True, *arguments,
    ):  # fmt: skip
        rest = (stride, padding, padding_algorithm, dilation, groups, data_format, channel_dim, op_type, use_cudnn)
        if op_type != "conv2d" or data_format != "NCHW" or not paddle.in_dynamic_mode():
            return original(x, weight, bias, *rest, *arguments)
        return convolution(on, original, x, weight, bias, *rest, *arguments)

    return conv_nd


def replacement_for_conv2d(original, on):
    """Paddle's function for convolutions without a layer, by `convolution`."""

    def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, data_format="NCHW", name=None):
        rest = (stride, padding, dilation, groups, data_format, name)
        if data_format != "NCHW" or not paddle.in_dynamic_mode():
            return original(x, weight, bias, *rest)
        return convolution(on, original, x, weight, bias, *rest)

    return conv2d


class AddBias(PyLayer):
    """[…, N] + [N], whose gradient for the bias is a product of ones [1, M] with the other one's [M, N].

    Paddle's is a sum over the first axes, which its kernel takes a number at a time, with one thread. The order of the
    sum differs, so it is the same up to rounding.
    """

    @staticmethod
    def forward(ctx, x, bias):
        ctx.frozen = x.stop_gradient
        return x + bias

    @staticmethod
    def backward(ctx, gradient):
        rows = gradient.reshape([-1, gradient.shape[-1]])
        ones = paddle.ones([1, rows.shape[0]], dtype=rows.dtype)
        return None if ctx.frozen else gradient, matmul(ones, rows).reshape([-1])


def replacement_for_linear(original, _):
    """A linear layer with the bias of `AddBias`, where a gradient for it will be asked for."""

    def linear(x, weight, bias=None, name=None):
        learns = bias is not None and not bias.stop_gradient and paddle.is_grad_enabled()
        if not learns or not paddle.in_dynamic_mode():
            return original(x, weight, bias, name)
        return AddBias.apply(original(x, weight, None), bias)

    return linear


def replacement_for_pad(original, _):
    """Numbers around images by Paddle's kernel for any axes; that for images takes 40 times as long. The same bits."""

    def padded(x, pad, mode="constant", value=0.0, data_format="NCHW", *arguments, **options):
        if mode == "constant" and data_format == "NCHW" and isinstance(pad, (list, tuple)) and x.ndim == len(pad) == 4:
            pad = [0, 0, 0, 0, *pad[2:], *pad[:2]]  # before and after, from the first axis on, not from the last
        return original(x, pad, mode, value, data_format, *arguments, **options)

    return padded


def replacement_for_cast(original, _):
    """`Tensor.cast` that gives the tensor itself where it has the type, as torch's `to`, and Paddle's a copy.

    ppdiffusers' layers, LoRA's above all, cast wherever diffusers' call `to`.
    """

    def cast(self, dtype):
        same = dtype_name(self) == str(dtype).removeprefix("paddle.")
        # Under `no_grad` a copy is also what has no gradients.
        return self if same and (self.stop_gradient or paddle.is_grad_enabled()) else original(self, dtype)

    return cast


def can_compile(module) -> bool:
    """Whether `module.encode` may be compiled here: its job allows it, and all samples have one shape.

    Paddle needs its newer graph, PIR: the engine of 2.6 fails on CLIP ("could not create a primitive descriptor").
    """
    return (
        "compiled_encoders" in enabled_patches()
        and paddle.framework.use_pir_api()
        and module.can_compile_encode
        and module.encode_batch_size == 1
        and not module.buckets
    )


class CompiledEncode:
    """Stands in for `module.encode`: the encoders' graph, run by Paddle's inference engine with oneDNN's kernels.

    oneDNN's convolutions and products are faster than those of Paddle's dynamic graph, and the engine fuses what
    follows them. The same up to rounding, 3e-6 of the largest number. It is compiled at the first batch, whose shapes
    all others must have. The engine has weights of its own, so the module's encoders are freed then.
    """

    def __init__(self, module):
        self.module, self.predictor, self.names = module, None, []

    def __call__(self, batch: dict) -> dict:
        if self.predictor is None:
            self.compile(batch)
        for name in self.predictor.get_input_names():
            self.predictor.get_input_handle(name).copy_from_cpu(batch[name].numpy())
        self.predictor.run()
        outputs = map(self.predictor.get_output_handle, self.predictor.get_output_names())
        return {name: paddle.to_tensor(output.copy_to_cpu()) for name, output in zip(self.names, outputs, strict=True)}

    def compile(self, batch: dict) -> None:
        """Trace `encode` on the shapes of a batch, and hand the graph over to the engine."""
        spec = {name: paddle.static.InputSpec(x.shape, dtype_name(x), name) for name, x in batch.items()}
        graph = EncodeGraph(self.module)
        remove_patches()  # they are for the dynamic graph
        with tempfile.TemporaryDirectory() as folder, paddle.no_grad():
            file = Path(folder) / "encode"
            paddle.jit.save(paddle.jit.to_static(graph, input_spec=[spec], full_graph=True), str(file))
            self.names = graph.output_names
            for name in self.module.encoders:
                setattr(self.module, name, None)
            del graph
            return_free_memory()  # the engine reads a copy of its own
            self.predictor = create_predictor(file)
        apply_patches()


class EncodeGraph(nn.Layer):
    """`module.encode` as a layer with the encoders' parameters alone, from named tensors to a list."""

    def __init__(self, module):
        super().__init__()
        self.encoders = nn.LayerList([getattr(module, name) for name in module.encoders])
        self.encode, self.output_names = type(module).encode.__get__(module), None
        self.eval()

    def forward(self, batch):
        encoded = self.encode(batch)
        self.output_names = list(encoded)
        return [paddle.assign(encoded[name]) for name in encoded]  # a result that is an input is no result to Paddle


def create_predictor(file: Path):
    """Paddle's inference engine for what `paddle.jit.save` wrote under a name without ending."""
    config = paddle.inference.Config(str(file.with_suffix(".json")), str(file.with_suffix(".pdiparams")))
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    config.set_cpu_math_library_num_threads(configured_threads())
    return paddle.inference.create_predictor(config)


def dtype_name(tensor) -> str:
    """`paddle.float32` -> "float32", in any Paddle."""
    return str(tensor.dtype).removeprefix("paddle.")
