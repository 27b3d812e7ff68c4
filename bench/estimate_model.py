"""How well low-bit estimates choose blocks on a model's own queries and keys, layer by layer.

Usage: python bench/estimate_model.py [--length N] [--every N] [--block-k N] [--row-stride N]
       [--budget E] [--json FILE]

For each layer of the demo's model three selectors search, head by head, the largest tau of .128,
.064 ... that keeps the error of attention's output, |out - dense| / |dense|, below the budget:
estimates from 4- and from 8-bit keys, and SALE's rule on exact float32 logits. Printed are the
share of the causal blocks that each keeps then, and the attention weight these hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

import attnsieve
import model_layers
from attnsieve.demo import measure
from attnsieve.methods import block_mass

BLOCK_Q, SINK_TOKENS, LOCAL_TOKENS = 64, 32, 256
START, END = 0.128, 1e-4


class Layer:
    """One layer's tensors, and what every selector shares."""

    def __init__(self, call: measure.Call, block_k: int, row_stride: int) -> None:
        self.q, self.k, self.v = call.q, call.k, call.v
        self.scale, self.block_k, self.row_stride = (
            call.mask["softmax_scale"],
            block_k,
            row_stride,
        )
        length = self.q.shape[2]
        shape = (1, 1, -(-length // BLOCK_Q), (-(-length // block_k) + 31) // 32)
        near = attnsieve.select_marked(
            torch.zeros(shape, dtype=torch.int32),
            length,
            length,
            block_k=block_k,
            sink_blocks=-(-SINK_TOKENS // block_k),
            local_blocks=-(-(LOCAL_TOKENS - BLOCK_Q) // block_k),
            diagonal=True,
            causal=True,
        )
        self.near = near.to_dense(-(-length // block_k))
        mask = dict(causal=True, softmax_scale=self.scale)
        self.dense = attnsieve.block_sparse_attention(self.q, self.k, self.v, **mask)
        _, self.lse = attnsieve.block_sparse_attention(
            self.q, self.k, self.v, near, return_lse=True, **mask
        )
        blocks = dict(block_q=BLOCK_Q, block_k=block_k)
        self.mass = block_mass(self.q, self.k, **blocks, **mask)
        first_keys = torch.arange(self.near.shape[3]) * block_k
        last_rows = torch.arange(1, self.near.shape[2] + 1) * BLOCK_Q - 1
        self.visible = first_keys <= last_rows[:, None]

    def estimated(self, bits: int) -> Tensor:
        """Block maxima of low-bit logits less the log-sum-exp of sink and local keys."""
        coded = attnsieve.quantize_blocks(self.k, bits=bits, scale_rows="key_quads")
        groups = self.q.unflatten(1, (self.k.shape[1], -1))
        of_mean = torch.einsum("bhgsd,bhd->bhgs", groups, coded.mean).flatten(1, 2) * self.scale
        return attnsieve.estimate_block_scores(
            attnsieve.quantize_blocks(self.q, smooth=False),
            coded,
            threshold=self.lse - of_mean,
            block_k=self.block_k,
            row_stride=self.row_stride,
            softmax_scale=self.scale,
            causal=True,
        )

    def exact(self) -> Tensor:
        """The same from float32 logits."""
        length = self.q.shape[2]
        keys = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1).transpose(2, 3)
        margins = torch.full_like(self.mass, -torch.inf)
        for row in range(margins.shape[2]):
            rows = torch.arange(row * BLOCK_Q, min((row + 1) * BLOCK_Q, length), self.row_stride)
            stop = min(length, (row + 1) * BLOCK_Q)
            logits = self.q[:, :, rows] @ keys[..., :stop] * self.scale - self.lse[:, :, rows, None]
            logits.masked_fill_(torch.arange(stop) > rows[:, None], -torch.inf)
            best = torch.nn.functional.pad(
                logits.amax(2), (0, -stop % self.block_k), value=-torch.inf
            ).unflatten(-1, (-1, self.block_k))
            margins[:, :, row, : best.shape[2]] = best.amax(-1)
        return margins

    def search(self, margins: Tensor, budget: float) -> dict:
        """Density and recall, means over heads, at the largest tau of each head."""
        taus = torch.full((1, margins.shape[1], 1, 1), START)
        while True:
            kept = ((margins > taus.log()) | self.near) & self.visible
            index = attnsieve.BlockIndex.from_dense(kept, BLOCK_Q, self.block_k)
            out = attnsieve.block_sparse_attention(
                self.q, self.k, self.v, index, causal=True, softmax_scale=self.scale
            )
            norms = [(x[0].flatten(1)).norm(dim=1) for x in (out - self.dense, self.dense)]
            failed = (norms[0] / norms[1] >= budget).view(1, -1, 1, 1) & (taus > 0)
            if not failed.any():
                break
            taus = torch.where(failed, taus / 2, taus)
            taus[taus <= END] = 0.0
        recall = (self.mass * kept).sum((2, 3)) / self.mass.sum((2, 3))
        density = kept.sum((2, 3)) / self.visible.sum()
        return dict(density=float(density.mean()), recall=float(recall.mean()))


def main() -> None:
    """Search in every layer and print."""
    options = model_layers.options(__doc__.splitlines()[0], length=8192)
    options.add_argument("--block-k", type=int, default=32)
    options.add_argument("--row-stride", type=int, default=1)
    options.add_argument("--budget", type=float, default=0.05)
    chosen = options.parse_args()

    def look(number: int, call: measure.Call) -> dict:
        layer = Layer(call, chosen.block_k, chosen.row_stride)
        found = {
            f"{bits} bits": layer.search(layer.estimated(bits), chosen.budget) for bits in (4, 8)
        }
        found["exact"] = layer.search(layer.exact(), chosen.budget)
        texts = (f"{n} {x['density']:.4f} ({x['recall']:.4f})" for n, x in found.items())
        print(f"layer {number:2}: " + ", ".join(texts), flush=True)
        return found

    settings = ("length", "block_k", "row_stride", "budget")
    rows = model_layers.observe(chosen, settings, look)
    for name in ("4 bits", "8 bits", "exact"):
        density = sum(row[name]["density"] for row in rows) / len(rows)
        print(f"{name}: density {density:.4f} over {len(rows)} layers")


if __name__ == "__main__":
    main()
