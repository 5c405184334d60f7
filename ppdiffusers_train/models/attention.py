"""Attention kernels."""


def enable_memory_efficient_attention(model):
    """Switch a model to Paddle's memory-efficient attention; where there is none, the line that says so, else None."""
    try:
        model.enable_xformers_memory_efficient_attention()
    except (NotImplementedError, ModuleNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0][:80]
        return f"--enable_xformers_memory_efficient_attention: no effect, plain attention is used ({reason})"
    return None


def announce_plain_attention(reason: str) -> None:
    """Say that `--enable_xformers_memory_efficient_attention` changes nothing, and why."""
    print(f"--enable_xformers_memory_efficient_attention: no effect, plain attention is used ({reason})")
