"""A suite of compare.py on the tensors of the demo's model (transformers, gguf, accelerate)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

import attnsieve
from attnsieve.demo import measure as demo
from attnsieve.demo import model as models
from attnsieve.demo.options import DEFAULT_TEXT_OFFSET
from attnsieve.integrations.transformers import register
from attnsieve.methods import Method
from cases_threshold import skipped_share
from measure import row, time_gpu


@dataclass
class Capture(Method):
    """Dense attention that keeps the tensors of every layer."""

    layers: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def __call__(
        self, q, k, v, *, causal, window=None, softmax_scale=None, sink=None, layer_idx=None
    ) -> torch.Tensor:
        self.layers.append(tuple(x.contiguous() for x in (q, k, v)))
        return attnsieve.threshold_attention(
            q, k, v, None, causal=causal, softmax_scale=softmax_scale
        )


def threshold_model(choice) -> Iterator[dict]:
    """Prefill on q, k, v of all layers of the demo's model: times are of all layers together."""
    length, device = 8192, torch.device("cuda")
    register()
    subject = models.load_subject(None, models.default_cache_dir(), torch.bfloat16, device)
    ids = models.token_window(subject, models.read_text(None), DEFAULT_TEXT_OFFSET, length)
    capture = Capture()
    demo.forward(subject, ids.to(device), capture)
    layers = capture.layers
    _, heads, _, dim = layers[0][0].shape

    def attend(threshold: float | None) -> None:
        for q, k, v in layers:
            attnsieve.threshold_attention(q, k, v, threshold, causal=True)

    dense = time_gpu(lambda: attend(None))
    for scale in (30, 100, 300, 1000, 3000):
        case = f"threshold smollm2 L{length} F{scale}"
        if not choice.takes(case):
            continue
        counters = torch.stack(
            [
                attnsieve.threshold_attention(
                    q, k, v, scale / length, causal=True, return_counters=True
                )[1]
                for q, k, v in layers
            ]
        )
        skipped = skipped_share(counters.sum(0))
        pairs = len(layers) * heads * length * length * 0.5 * (1 - skipped)
        yield row(
            "attend",
            case,
            "cuda",
            time_gpu(lambda scale=scale: attend(scale / length)),
            {"attnsieve-dense": dense},
            pairs=pairs,
            head_dim=dim,
            density=round(1 - skipped, 4),
            shape=layers[0][0].shape,
            skipped=round(skipped, 4),
        )
