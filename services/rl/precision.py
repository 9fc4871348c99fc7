"""Which number format a network runs in here. Speed only: losses and optimisers are always float32."""

from __future__ import annotations

import torch


def resolve(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the processor or GPU computes in it, and float32 elsewhere.

    Without such instructions a CPU emulates bfloat16, several times slower than float32.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = bool(
                torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001  (there is no public question)
                or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
            )
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
