"""Which RoPE frequencies of a head say which keys matter: FASA's contextual agreement, as JSON.

    calibration = FASACalibration.load("fasa.json")    # written by `attnsieve calibrate fasa`
    with use(decode=FASA.calibrated(calibration)):     # attnsieve.integrations.transformers
        model.generate(**inputs)

RoPE splits a logit into a sum over pairs of dims. A few pairs rank the keys of a context almost as
the whole logit does, and they are those of the head, not of the text (FASA, arXiv 2602.03152).
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from attnsieve._records import read_record, write_record
from attnsieve.rotary import from_pairs, to_pairs

__all__ = ["SHARES", "FASACalibration", "contextual_agreement", "dominant_dims"]

SCHEMA = 1
SHARES = ("kv_head", "query_head")
# A row's best keys are at most this share of those it sees, so that short texts tell pairs apart.
_LARGEST_SHARE = 0.25


@dataclass(frozen=True)
class FASACalibration:
    """The agreement of every pair of a model.

    Attributes:
        model: its name. version: of the library that measured.
        topk, rows, share, interleaved: as in :func:`contextual_agreement`.
        lengths: of the texts in tokens; the agreement is the mean over them.
        agreement: of each layer, of each head, of each pair.
    """

    model: str
    version: str
    topk: int
    rows: int
    share: str
    interleaved: bool
    lengths: tuple[int, ...]
    agreement: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        if self.share not in SHARES:
            raise ValueError(f"share: expected one of {', '.join(SHARES)}, got {self.share!r}")
        sizes = {(len(layer), len(head)) for layer in self.agreement for head in layer}
        if len(sizes) != 1:
            raise ValueError("agreement: expected as many heads and pairs in every layer")
        numbers = (x for layer in self.agreement for head in layer for x in head)
        if any(not 0 <= x <= 1 for x in numbers):
            raise ValueError("agreement: expected numbers from 0 to 1")

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the calibration as JSON."""
        write_record(path, self, SCHEMA)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FASACalibration:
        """Reads what :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a calibration of this schema; the text names what is wrong.
        """
        return read_record(path, cls, SCHEMA, ("agreement",))


def contextual_agreement(
    q: Tensor,
    k: Tensor,
    *,
    topk: int = 256,
    rows: int = 16,
    share: str = "kv_head",
    interleaved: bool = False,
) -> Tensor:
    """How much of a row's best keys each pair of dims finds by itself.

    The share of the ``topk`` keys of largest logit that are also among the ``topk`` of the pair's
    part of the logit, mean over the last ``rows`` rows. Where a row sees fewer than four times
    ``topk`` keys, a quarter of them counts.

    Args:
        q: ``[B, Hq, Sq, D]``; k: ``[B, Hkv, Sk, D]`` with Sk >= Sq, after RoPE: row i sees keys
            ``j <= i + Sk - Sq``.
        share: "kv_head", the mean over the query heads of each KV head; or "query_head".
        interleaved: a pair is two neighbouring dims, not ``i`` and ``i + D / 2``.

    Returns:
        float32 ``[B, H, D / 2]``, H = Hkv or Hq.

    Raises:
        ValueError: a shape or option that is none of the above.
    """
    _check(q, k, topk, rows, share)
    rows, seqlen, group = min(rows, q.shape[2]), k.shape[2], q.shape[1] // k.shape[1]
    count = max(1, min(topk, int(_LARGEST_SHARE * (seqlen - rows + 1))))
    columns = torch.arange(seqlen, device=q.device)
    hidden = columns > columns[seqlen - rows :, None]
    queries = q[:, :, -rows:].float().unflatten(1, (-1, group))
    keys = k.float().unsqueeze(2)

    def best(queries: Tensor, keys: Tensor) -> Tensor:
        logits = (queries @ keys.transpose(3, 4)).masked_fill(hidden, -torch.inf)
        return logits.topk(count).indices

    shape = *queries.shape[:4], seqlen
    chosen = torch.zeros(shape, device=q.device).scatter_(4, best(queries, keys), 1.0)
    hits = []
    pairs = (to_pairs(x, interleaved).movedim(-2, 0) for x in (queries, keys))
    for of_queries, of_keys in zip(*pairs, strict=True):
        hits.append(chosen.gather(4, best(of_queries, of_keys)).sum((3, 4)))
    table = torch.stack(hits, -1)  # [B, Hkv, G, D / 2], whole numbers: equal agreements are equal
    if share == "kv_head":
        return table.sum(2) / (count * rows * group)
    return table.flatten(1, 2) / (count * rows)


def dominant_dims(agreement: Tensor, pairs: int, interleaved: bool = False) -> Tensor:
    """int64 ``[..., 2 * pairs]``: the dims of the ``pairs`` pairs of largest agreement, ascending.

    Of equal agreements the lower pair comes first.

    Args:
        agreement: ``[..., D / 2]``, as :func:`contextual_agreement` returns it.

    Raises:
        ValueError: pairs is not a multiple of 4 (a scored row's width is one of 8) up to D / 2.
    """
    most = agreement.shape[-1]
    if not 0 < pairs <= most or pairs % 4:
        raise ValueError(f"pairs: expected a multiple of 4 from 4 to {most}, got {pairs}")
    best = agreement.sort(dim=-1, descending=True, stable=True).indices[..., :pairs]
    dims = to_pairs(torch.arange(2 * most, device=agreement.device), interleaved)
    return from_pairs(dims[best.sort(-1).values], interleaved)


def _check(q: Tensor, k: Tensor, topk: int, rows: int, share: str) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floating [B, H, S, D]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError("k: batch and head_dim must be q's")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError("k: its heads must divide q's")
    if not 0 < q.shape[2] <= k.shape[2]:
        raise ValueError(f"q: expected 1 to {k.shape[2]} rows, got {q.shape[2]}")
    if q.shape[3] % 2:
        raise ValueError(f"q: expected an even head_dim, got {q.shape[3]}")
    for name, value in (("topk", topk), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if share not in SHARES:
        raise ValueError(f"share: expected one of {', '.join(SHARES)}, got {share!r}")
