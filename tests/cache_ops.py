"""proxy_scores and append_kv on a device, with operands and results on the CPU."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map_only

import attnsieve

# (query rows, dtype): the CUDA kernel for every problem, and the one that streams keys.
PATHS = ((3, torch.float32), (3, torch.bfloat16), (1, torch.bfloat16))


class CacheOps:
    def __init__(self, device: str):
        self.device = device

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """The same strides over a copy of the whole storage; on the CPU ``x`` itself."""
        if self.device == "cpu" or x.numel() == 0:
            return x.to(self.device)
        elements = x.untyped_storage().nbytes() // x.element_size()
        whole = x.as_strided((elements,), (1,), 0).to(self.device)
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    def proxy_scores(self, *args, **options) -> torch.Tensor:
        args, options = tree_map_only(torch.Tensor, self.to_device, (args, options))
        return attnsieve.proxy_scores(*args, **options).cpu()

    def append_kv(self, *args, **options) -> None:
        there, own = tree_map_only(torch.Tensor, self.to_device, (args, options))
        result = attnsieve.append_kv(*there, **own)
        if self.device == "cpu":
            return result
        side = [name for name in ("bounds", "proxy") if options.get(name) is not None]
        written = [*zip(args, there, strict=True), *((options[n], own[n]) for n in side)]
        for to, x in written:  # k and v too: nothing may have changed them
            to.copy_(x)
        return result
