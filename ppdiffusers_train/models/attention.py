"""Attention kernels."""


def enable_memory_efficient_attention(model) -> None:
    """Switch a model to Paddle's memory-efficient attention, or say that there is none here."""
    try:
        model.enable_xformers_memory_efficient_attention()
    except (NotImplementedError, ModuleNotFoundError, ValueError) as error:
        announce_plain_attention(str(error).splitlines()[0][:80])


def announce_plain_attention(reason: str, flag: str = "--enable_xformers_memory_efficient_attention") -> None:
    """Say that a flag changes nothing, and why."""
    print(f"{flag}: no effect, plain attention is used ({reason})")
