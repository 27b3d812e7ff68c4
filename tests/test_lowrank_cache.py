"""LowRankCache holds what other caches hold, and LowRank(offload=True) chooses the same tokens."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from attnsieve.integrations import transformers as integration
from attnsieve.integrations import transformers_cache
from attnsieve.integrations.transformers_cache import LowRankCache
from attnsieve.methods import LowRank
from tiny_models import TOLERANCE, llama, padding, tokens, with_implementation

integration.register()
OPTIONS = dict(max_new_tokens=24, do_sample=False)


def narrow(**options):
    return LowRank(12, rank=8, recent=4, **options)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "attnsieve"])
@pytest.mark.parametrize("padded", [False, True])
def test_any_attention_reads_it(device, implementation, padded):
    """Prefill, steps of one and of five rows, a piece of 40 rows, and tokens taken back."""
    model, ids = llama(device), tokens(2, 130, device)
    mask = padding([130, 104], 130, "left", device) if padded else None
    model = with_implementation(model, implementation)
    caches, at = [LowRankCache(model.config, max_length=130), DynamicCache()], 0
    for rows in (50, 1, 5, 40, 1, -3, 8, 1, 27):
        if rows < 0:
            for cache in caches:
                cache.crop(rows)
        else:
            part = dict(input_ids=ids[:, at : at + rows])
            if padded:
                part["attention_mask"] = mask[:, : at + rows]
            got, want = (model(**part, past_key_values=cache).logits for cache in caches)
            torch.testing.assert_close(got[0], want[0], **TOLERANCE[model.dtype])
        at += rows
        assert caches[0].get_seq_length() == at
    caches[0].reset()
    assert caches[0].get_seq_length() == 0
    again = model(input_ids=ids, past_key_values=caches[0]).logits
    torch.testing.assert_close(again, model(input_ids=ids).logits, **TOLERANCE[model.dtype])


@torch.no_grad()
@pytest.mark.parametrize("share", ["kv_head", "query_head"])
@pytest.mark.parametrize("padded", [False, True])
def test_offloaded_text_is_the_resident_one(device, share, padded):
    model, ids = with_implementation(llama(device), "attnsieve"), tokens(2, 90, device)
    mask = padding([90, 57], 90, "left", device) if padded else torch.ones_like(ids)
    dense = model.generate(ids, attention_mask=mask, **OPTIONS)
    runs, methods = [], [narrow(share=share), narrow(share=share, offload=True)]
    for method, cache in zip(
        methods, (DynamicCache(), LowRankCache(model.config, 120)), strict=True
    ):
        with integration.use(decode=method):
            runs.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], dense)
    offloaded = methods[1]
    assert 0.2 < offloaded.hit_rate < 1.0
    assert offloaded.bytes_moved > 0 and methods[0].bytes_moved == 0
    offloaded.reset()
    assert offloaded.hit_rate == 1.0 and not offloaded.working_sets


@torch.no_grad()
def test_steps_of_several_rows_and_rejected_tokens(device):
    model, ids = with_implementation(llama(device), "attnsieve"), tokens(2, 130, device)
    logits = []
    for offload, cache in ((False, DynamicCache()), (True, LowRankCache(model.config, 130))):
        found, at = [], 0
        with integration.use(decode=narrow(offload=offload)):
            for rows in (90, 1, 1, 4, -3, 1, 1, -2, 1, 8, 1):
                if rows < 0:
                    cache.crop(rows)
                else:
                    # Other tokens than the rejected ones, at their positions.
                    part = (ids[:, at : at + rows] + len(found)) % 90
                    found.append(model(input_ids=part, past_key_values=cache).logits)
                at += rows
        logits.append(torch.cat(found, 1))
    torch.testing.assert_close(*logits, **TOLERANCE[model.dtype])


@torch.no_grad()
def test_a_failed_allocation_leaves_the_cache_usable(monkeypatch):
    model, ids = with_implementation(llama(), "attnsieve"), tokens(2, 60)
    cache, made = LowRankCache(model.config, 80), []

    def limited(*args, **options):
        made.append(1)
        if len(made) == 2:
            raise RuntimeError("no pinned memory")
        return torch.zeros(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(transformers_cache, "host_cache", limited)
        with pytest.raises(RuntimeError, match="no pinned memory"):
            model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 0 and not any(x.is_initialized for x in cache.layers)
    got = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(got, model(input_ids=ids).logits)
    assert all(layer.length == 60 for layer in cache.layers)


@torch.no_grad()
def test_beams_and_what_is_refused():
    model, ids = with_implementation(llama(), "sdpa"), tokens(2, 40)
    options = dict(num_beams=3, max_new_tokens=12, do_sample=False)
    got = model.generate(ids, past_key_values=LowRankCache(model.config, 64), **options)
    assert torch.equal(got, model.generate(ids, **options))
    with pytest.raises(ValueError, match="max_length is 50"):
        cache = LowRankCache(model.config, 50)
        model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    with pytest.raises(ValueError, match="list_heads"):
        LowRank(offload=True, list_heads="q")
    with pytest.raises(ValueError, match="crop"):
        cache.crop(3)
