"""Decode steps of whole models: methods in `generate`, and the paged cache."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AttentionInterface, DynamicCache, GptOssConfig
from transformers.models.gpt_oss import GptOssForCausalLM

from attnsieve.integrations import transformers as integration
from attnsieve.integrations.transformers_cache import AttnsievePagedCache
from attnsieve.methods import (
    DSA,
    FASA,
    Delta,
    DenseDecode,
    LowRank,
    PooledTopK,
    Quest,
    Recycled,
    Squeezed,
    TidalDecode,
    TokenSelect,
    TriAttention,
)
from decode_rules import delta, index_inputs, quest, tidaldecode, tokenselect
from tiny_models import (
    SIZES,
    TOLERANCE,
    build,
    llama,
    mistral,
    padding,
    tokens,
    with_implementation,
)

LAYERS = 5
INV_FREQ = 10000.0 ** -(torch.arange(0, 64, 2) / 64)  # of the models here


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def model_of(device="cpu", **changes):
    sizes = dict(num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=3)
    sizes |= dict(hidden_size=192, initializer_range=0.1)
    model = llama(device, **{**sizes, **changes})
    return with_implementation(model, "attnsieve")


def covering():
    """Methods whose budgets hold every sequence of these tests."""
    every = (DenseDecode(), Quest(1024), TidalDecode(1024), Delta(1024), Recycled(1024, stride=3))
    every += TokenSelect(1024), DSA(index_inputs, 1024), TriAttention(INV_FREQ, 1024)
    return *every, Squeezed(0.0), FASA(1024), LowRank(1024, rank=16)


def narrow():
    return (
        Quest(48, dense_layers=1),
        TidalDecode(12, dense_layers=1, correction_layers=(3,)),
        Delta(48, recent_pages=1, dense_layers=1, delta_layers=(1, 3)),
        Recycled(12, stride=4),
        TokenSelect(12, 2, 8),
        DSA(index_inputs, 20),
        LowRank(12, rank=8, recent=4),
        FASA(12, pairs=4),
        Squeezed(0.8, share=0.1, observed=20),
        TriAttention(INV_FREQ, 16, period=8, recent=4, keep_prompt=False),
    )


def name(method) -> str:
    return type(method).__name__


def cache_options(kind, model):
    if kind == "paged":
        return dict(past_key_values=AttnsievePagedCache(model.config, max_length=120))
    return dict(cache_implementation=kind)


@torch.no_grad()
@pytest.mark.parametrize("method", covering(), ids=name)
@pytest.mark.parametrize("cache", ["dynamic", "dynamic-padded", "static", "static-padded", "paged"])
def test_a_budget_that_holds_everything_is_dense(cache, method):
    model, ids = model_of(), tokens(3, 70)
    padded = cache.endswith("-padded")
    mask = padding([70, 44, 9], 70, "left") if padded else torch.ones_like(ids)
    options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False)
    expected = with_implementation(model, "eager").generate(ids, **options)
    with_implementation(model, "attnsieve")
    with integration.use(decode=method):
        got = model.generate(ids, **options, **cache_options(cache.split("-")[0], model))
    assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("method", narrow(), ids=name)
def test_caches_agree_and_prefill_forgets(method):
    """A small budget changes the text, and changes it alike in every cache and every time."""
    model, ids = model_of(), tokens(2, 90)
    options = dict(max_new_tokens=24, do_sample=False)
    dense = model.generate(ids, **options)
    runs = []
    with integration.use(decode=method):
        for cache in ("dynamic", "static", "paged", "dynamic"):
            runs.append(model.generate(ids, **options, **cache_options(cache, model)))
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert torch.equal(runs[0][:, :91], dense[:, :91])  # the prompt's own token is the prefill's
    assert not torch.equal(runs[0], dense)


def emulated(rule_of_step):
    """Attention in the dtype of the model over the positions that a rule names, head by head."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        rows, length = query.shape[2], key.shape[2]
        group = query.shape[1] // key.shape[1]
        out = torch.zeros_like(query)
        for b in range(query.shape[0]):
            kept = None
            if rows == 1:
                kept = rule_of_step(module.layer_idx, b, query[b, :, 0], key[b])
            for h in range(query.shape[1]):
                scores = query[b, h] @ key[b, h // group].T * scaling
                seen = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
                if kept is not None:
                    seen[:] = False
                    seen[0, sorted(kept[h])] = True
                weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
                out[b, h] = weights @ value[b, h // group]
        return out.transpose(1, 2).contiguous(), None

    return attention


def rules():
    """(method, its rule); rules of methods that reuse lists remember them by (layer, sequence)."""
    lists = {}

    def reuse(choose, layers):
        def rule(layer, b, q, k):
            if layer < 1:
                return None
            if layer in layers:
                lists[b] = choose(q, k)
                return None
            return lists[b]

        return rule

    yield Quest(48, dense_layers=1), lambda n, b, q, k: quest(q, k, 48, 16) if n else None
    yield (
        TidalDecode(12, dense_layers=1, correction_layers=(3,)),
        reuse(lambda q, k: tidaldecode(q, k, 12), (1, 3)),
    )
    yield (
        Delta(48, recent_pages=1, dense_layers=1, delta_layers=(1, 3)),
        reuse(lambda q, k: delta(q, k, 48, 16, 1), (1, 3)),
    )
    yield (
        TokenSelect(12, 2, 8, similarity=None),
        lambda n, b, q, k: tokenselect(q, k, 12, 2, 8, 0.125),
    )


@torch.no_grad()
@pytest.mark.parametrize("case", list(rules()), ids=lambda case: type(case[0]).__name__)
@pytest.mark.parametrize("paged", [False, True])
def test_teacher_forced_logits(case, paged):
    """Logits of every step are those of the same model in float64 under the paper's rule."""
    method, rule = case
    AttentionInterface.register("emulated", emulated(rule))
    model, ids = model_of(), tokens(2, 100)
    double = with_implementation(copy.deepcopy(model).double(), "emulated")
    dense = with_implementation(copy.deepcopy(model), "sdpa")
    caches = [AttnsievePagedCache(model.config, 100) if paged else DynamicCache()]
    caches += [DynamicCache(), DynamicCache()]
    far = 0.0
    with integration.use(decode=method):
        for begin, end in ((0, 90), *((n, n + 1) for n in range(90, 100))):
            got, want, full = (
                m(input_ids=ids[:, begin:end], past_key_values=cache).logits
                for m, cache in zip((model, double, dense), caches, strict=True)
            )
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
            far = max(far, float((got - full).abs().max()))
    assert far > 0.01  # the budget did bind


@torch.no_grad()
@pytest.mark.parametrize("method", narrow(), ids=name)
def test_padding_does_not_reach_a_sparse_step(method):
    model, ids = model_of(), tokens(2, 90)
    mask = padding([90, 57], 90, "left")
    options = dict(max_new_tokens=16, do_sample=False)
    with integration.use(decode=method):
        both = model.generate(ids, attention_mask=mask, **options)
        for b, length in enumerate((90, 57)):
            alone = model.generate(ids[b : b + 1, 90 - length :], **options)
            assert torch.equal(both[b, 90:], alone[0, length:])


@torch.no_grad()
def test_a_short_prompt_is_a_prefill():
    """Of 5 tokens, fewer than a step may have: it is dense and forgets the text before it."""
    model, options = model_of(), dict(max_new_tokens=12, do_sample=False)
    used = Recycled(12, stride=99)
    with integration.use(decode=used):
        model.generate(tokens(2, 90), **options)
        short = model.generate(tokens(2, 5), **options)
    assert all(kept.begin.tolist() == [6, 6] for kept, _ in used.state.values())
    assert torch.equal(short[:, :6], model.generate(tokens(2, 5), **options)[:, :6])


@torch.no_grad()
@pytest.mark.parametrize("method", [None, DenseDecode()])
def test_paged_logits(device, method):
    """Prefill, steps of one and of five rows, a piece of 40 rows, and tokens taken back."""
    model, ids = model_of(device), tokens(2, 130, device)
    whole = with_implementation(model, "eager")(input_ids=ids).logits
    with_implementation(model, "attnsieve")
    cache, at = AttnsievePagedCache(model.config, max_length=130), 0
    with integration.use(decode=method):
        for rows in (50, 1, 5, 40, 1, -3, 8, 1, 27):
            if rows < 0:
                cache.crop(rows)
            else:
                part = ids[:, at : at + rows]
                got = model(input_ids=part, past_key_values=cache).logits
                torch.testing.assert_close(got, whole[:, at : at + rows], **TOLERANCE[model.dtype])
            at += rows
            assert cache.get_seq_length() == at and cache.pages.lengths == [at, at]
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(again, whole, **TOLERANCE[model.dtype])


@torch.no_grad()
def test_paged_sliding_window():
    model, ids = mistral(33), tokens(2, 60)
    options = dict(max_new_tokens=30, do_sample=False)
    expected = with_implementation(model, "eager").generate(ids, **options)
    with_implementation(model, "attnsieve")
    with integration.use(decode=Quest(64)):  # windowed layers stay as they are
        got = model.generate(ids, **options, **cache_options("paged", model))
    assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("method", covering()[:-1], ids=name)
def test_attention_sinks(method):
    """gpt-oss: sink logits, every other layer with a window."""
    sizes = dict(SIZES, num_hidden_layers=LAYERS - 1)
    config = GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, sliding_window=40)
    model = build(GptOssForCausalLM, config)
    for layer in model.model.layers:
        layer.self_attn.sinks.normal_(std=2.0)
    ids, logits = tokens(2, 80), {}
    for kind in ("eager", "attnsieve"):
        with_implementation(model, kind)
        with integration.use(decode=method):
            cache = model(input_ids=ids[:, :70], use_cache=True).past_key_values
            steps = [model(input_ids=ids[:, n : n + 1], past_key_values=cache) for n in (70, 71)]
        logits[kind] = torch.cat([step.logits for step in steps], 1)
    torch.testing.assert_close(logits["attnsieve"], logits["eager"], **TOLERANCE[torch.float32])


class Prefilled(DenseDecode):
    """Notes the pieces of prefills: (sequence, layer, begin, rows)."""

    pieces = ()

    def prefill(self, q, k, *, layer_idx=0, sequence=0, begin=0):
        assert q.shape[2] == k.shape[2]
        self.pieces += ((sequence, layer_idx, begin, q.shape[2]),)


@torch.no_grad()
@pytest.mark.parametrize("paged", [False, True])
def test_prefills_tell_where_their_pieces_begin(paged):
    model, ids, method = model_of(num_hidden_layers=1), tokens(2, 70), Prefilled()
    cache = AttnsievePagedCache(model.config, 80) if paged else DynamicCache()
    with integration.use(decode=method):
        for rows in (slice(0, 40), slice(40, 60), slice(60, 61), slice(61, 70)):
            model(input_ids=ids[:, rows], past_key_values=cache)
        if not paged:
            mask = padding([70, 44], 70, "left")
            model.generate(ids, attention_mask=mask, max_new_tokens=2)
    padded = () if paged else ((0, 0, 0, 70), (1, 0, 0, 44))
    assert method.pieces == ((0, 0, 0, 40), (0, 0, 40, 20), (0, 0, 61, 9), *padded)


@torch.no_grad()
def test_the_paged_cache_refuses_what_it_cannot_do():
    model, ids = model_of(), tokens(2, 40)

    def paged(max_length=64):
        return AttnsievePagedCache(model.config, max_length)

    with pytest.raises(NotImplementedError, match="padded batches"):
        mask = padding([40, 20], 40, "left")
        model.generate(ids, attention_mask=mask, past_key_values=paged(), max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="beam search"):
        model.generate(ids, past_key_values=paged(), num_beams=2, max_new_tokens=4)
    with pytest.raises(ValueError, match="max_length is 64"):
        model.generate(ids, past_key_values=paged(), max_new_tokens=30)
    cache = paged(200)
    with integration.use(PooledTopK(0.5)):
        model(input_ids=tokens(2, 70), past_key_values=cache)
        with pytest.raises(NotImplementedError, match="sparse prefill after keys"):
            model(input_ids=tokens(2, 70), past_key_values=cache)
    for other in ("sdpa", "eager"):
        with_implementation(model, other)
        with pytest.raises(NotImplementedError, match="attn_implementation='attnsieve'"):
            model(input_ids=ids, past_key_values=paged())


def test_choices_nest_and_are_checked():
    model, quest_method = model_of(), Quest(64)
    layer = model.model.layers[0].self_attn

    def chosen():
        return integration._choice_of_module.get(layer, integration._choice)

    with integration.use(PooledTopK(0.5), decode=quest_method):
        assert chosen() == integration._Choice(PooledTopK(0.5), quest_method)
        with integration.use(None, model):
            assert chosen() == integration._Choice()
        assert chosen().decode is quest_method
    assert chosen() == integration._Choice()
    with pytest.raises(TypeError, match="method must be"):
        integration.set_method(quest_method)
    with pytest.raises(TypeError, match="decode must be"):
        integration.set_method(decode=PooledTopK(0.5))
