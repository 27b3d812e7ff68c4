"""The transformers integration: logits and tokens as in eager mode, padding kept out, refusals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GptOssConfig
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.gpt_oss import GptOssForCausalLM

from attnsieve.integrations import transformers as integration
from attnsieve.methods import (
    SALE,
    Dense,
    Method,
    OracleTopK,
    PooledTopK,
    PooledTopP,
    SpargeAttn,
    Threshold,
    XAttention,
)
from attnsieve.methods.oracle import block_mass
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


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


def assert_same_logits(model, expected_by="eager", attention_mask=None, **inputs):
    expected = with_implementation(model, expected_by)(attention_mask=attention_mask, **inputs)
    actual = with_implementation(model, "attnsieve")(attention_mask=attention_mask, **inputs)
    shape = expected.logits.shape[:2]
    real = torch.ones(shape, device=model.device) if attention_mask is None else attention_mask
    real = real[:, -shape[1] :].bool()
    torch.testing.assert_close(actual.logits[real], expected.logits[real], **TOLERANCE[model.dtype])


@torch.no_grad()
@pytest.mark.parametrize("expected_by", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [1, 63, 200])
def test_prefill_logits(device, expected_by, length):
    assert_same_logits(llama(device), expected_by, input_ids=tokens(2, length, device))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_logits(device, side):
    mask = padding([150, 97, 1], 150, side, device)
    assert_same_logits(llama(device), attention_mask=mask, input_ids=tokens(3, 150, device))


@torch.no_grad()
def test_padding_is_not_dropped():
    model, ids = with_implementation(llama(), "attnsieve"), tokens(2, 90)
    mask = padding([90, 40], 90, "left")
    padded = model(input_ids=ids, attention_mask=mask).logits[1, -1]
    positions = torch.arange(50, 90)[None]
    alone = model(input_ids=ids[1:, 50:], position_ids=positions).logits[0, -1]
    torch.testing.assert_close(padded, alone, **TOLERANCE[torch.float32])
    assert not torch.allclose(padded, model(input_ids=ids).logits[1, -1], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        PooledTopK(0.3),
        PooledTopP(0.6),
        SALE(0.1, local_tokens=64),
        XAttention(0.7),
        SpargeAttn(),
        Threshold(20.0),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sparse_methods_do_not_see_padding(method, side):
    """A sequence's result does not depend on the padding around it: blocks start at its start."""
    model, ids = with_implementation(llama(), "attnsieve"), tokens(2, 300)
    mask = padding([300, 211], 300, side)
    real = slice(89, 300) if side == "left" else slice(0, 211)
    with integration.use(method):
        padded = model(input_ids=ids, attention_mask=mask).logits[1, real]
        positions = torch.arange(300)[None, real]
        alone = model(input_ids=ids[1:, real], position_ids=positions).logits[0]
    torch.testing.assert_close(padded, alone, **TOLERANCE[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_tokens(cache, padded):
    model, ids = llama(), tokens(3, 70)
    mask = padding([70, 44, 9], 70, "left") if padded else torch.ones_like(ids)
    options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False)
    expected = with_implementation(model, "eager").generate(ids, **options)
    actual = with_implementation(model, "attnsieve").generate(
        ids, cache_implementation=cache, **options
    )
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_decode_after_right_padding():
    """The padding then lies between the prompt and the new tokens."""
    model, ids = llama(), tokens(3, 70)
    mask = padding([70, 44, 9], 70, "right")
    longer = torch.cat([mask, torch.ones(3, 2, dtype=torch.long)], dim=1)
    logits = {}
    for name in ("eager", "attnsieve"):
        with_implementation(model, name)
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        logits[name] = model(
            input_ids=ids[:, :2], attention_mask=longer, past_key_values=cache
        ).logits
    torch.testing.assert_close(logits["attnsieve"], logits["eager"], **TOLERANCE[torch.float32])


@torch.no_grad()
def test_prefill_in_two_chunks():
    model, ids = with_implementation(llama(), "attnsieve"), tokens(2, 160)
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :100], use_cache=True)
    second = model(input_ids=ids[:, 100:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 100:], **TOLERANCE[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, [150, 81]])
def test_sliding_window_logits(lengths):
    mask = None if lengths is None else padding(lengths, 150, "left")
    assert_same_logits(mistral(33), attention_mask=mask, input_ids=tokens(2, 150))


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("prompt", [20, 60])
def test_sliding_window_generate(cache, prompt):
    """The cache turns from growing to sliding at 33 tokens."""
    model, ids = mistral(33), tokens(2, prompt)
    options = dict(attention_mask=padding([prompt, 15], prompt, "left"), do_sample=False)
    options |= dict(max_new_tokens=30, cache_implementation=cache)
    expected = with_implementation(model, "eager").generate(ids, **options)
    assert torch.equal(with_implementation(model, "attnsieve").generate(ids, **options), expected)


@torch.no_grad()
def test_attention_sinks():
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=40)
    model = build(GptOssForCausalLM, config)
    for layer in model.model.layers:
        layer.self_attn.sinks.normal_(std=2.0)
    mask = padding([120, 77], 120, "left")
    assert_same_logits(model, attention_mask=mask, input_ids=tokens(2, 120))


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        PooledTopK(1.0),
        PooledTopP(1.0),
        SALE(0.0),
        XAttention(1.0),
        SpargeAttn(similarity=1.0),
        Threshold(0.0),
        OracleTopK(1.0),
        Dense(),
    ],
)
def test_full_budget_is_dense(method):
    model, ids = with_implementation(llama(), "attnsieve"), tokens(1, 330)
    dense = model(input_ids=ids).logits
    with integration.use(method):
        sparse = model(input_ids=ids).logits
    torch.testing.assert_close(sparse, dense, **TOLERANCE[torch.float32])


@torch.no_grad()
def test_sparse_budget_changes_the_result():
    model, ids = with_implementation(llama(), "attnsieve"), tokens(1, 330)
    dense = model(input_ids=ids).logits
    with integration.use(PooledTopK(0.1)):
        assert not torch.allclose(model(input_ids=ids).logits, dense, atol=1e-4)
    assert torch.equal(model(input_ids=ids).logits, dense)


class Recorder(Method):
    """Dense attention that notes the query rows of each call."""

    def __init__(self, min_seqlen_q: int) -> None:
        self.min_seqlen_q = min_seqlen_q
        self.seqlens: list[int] = []

    def __call__(self, q, k, v, *, layer_idx=None, **settings):
        self.seqlens.append(q.shape[2])
        return Dense()(q, k, v, **settings)


@torch.no_grad()
@pytest.mark.parametrize(("min_seqlen_q", "expected"), [(64, [80, 80]), (0, [80, 80, 1, 1, 1, 1])])
def test_method_serves_prefill_and_decode_if_it_says_so(min_seqlen_q, expected):
    model, recorder = with_implementation(llama(), "attnsieve"), Recorder(min_seqlen_q)
    with integration.use(recorder):
        model.generate(tokens(1, 80), max_new_tokens=3, do_sample=False)
    assert recorder.seqlens == expected


def test_method_choice_nests_and_is_restored():
    model = llama()
    layer = model.model.layers[0].self_attn
    general, own = PooledTopK(0.5), Threshold(1.0)
    assert integration.current_method(layer) == Dense()
    with integration.use(general):
        with integration.use(own, model):
            assert integration.current_method(layer) is own
            assert integration.current_method(torch.nn.Identity()) is general
            with pytest.raises(RuntimeError), integration.use(None, model):
                assert integration.current_method(layer) == Dense()
                raise RuntimeError
            assert integration.current_method(layer) is own
        assert integration.current_method(layer) is general
    assert integration.current_method(layer) == Dense()
    with pytest.raises(TypeError, match="PooledTopK"):
        integration.set_method(PooledTopK)


def test_register_refuses_a_taken_name():
    integration.register()
    with pytest.raises(ValueError, match="'sdpa'"):
        integration.register("sdpa")


def attend(**changes):
    """One call of the integration's attention with 2 sequences, 4 heads, 8 tokens."""
    q = torch.randn(2, 4, 8, 64)
    k = v = torch.randn(2, 2, 8, 64)
    arguments = dict(query=q, key=k, value=v, attention_mask=None, scaling=0.125) | changes
    return integration.attention(torch.nn.Module(), **arguments)


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        (dict(query=torch.randn(2, 4, 8, 64, requires_grad=True)), "gradients"),
        (dict(dropout=0.1), "dropout"),
        (dict(softcap=30.0), "soft-capping"),
        (dict(position_bias=torch.zeros(1, 4, 8, 8)), "position biases"),
        (dict(output_attentions=True), "output_attentions"),
        (dict(cache=object()), "paged caches"),
        (dict(cu_seq_lens_q=torch.tensor([0, 8])), "packed"),
        (dict(is_causal=False, sliding_window=4), "bidirectional"),
        (dict(value=torch.randn(2, 2, 8, 32)), "head_dim"),
        (dict(attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool)), "custom masks"),
        (
            dict(
                attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]] * 2).bool(),
                sliding_window=4,
            ),
            "middle",
        ),
    ],
)
def test_unsupported_features_are_named(changes, feature):
    with pytest.raises(NotImplementedError, match=feature):
        attend(**changes)


def test_padding_rows_are_zero():
    mask = torch.tensor([[False] * 3 + [True] * 5, [False] * 8])
    out, weights = attend(attention_mask=mask)
    assert weights is None and out.is_contiguous() and out.shape == (2, 8, 4, 64)
    assert (out[0, :3] == 0).all() and (out[1] == 0).all() and out[0, 3:].abs().min() > 0


def test_bidirectional_attention_hides_padding_only():
    mask = torch.tensor([[True] * 5 + [False] * 3] * 2)
    q, k, v = torch.randn(2, 4, 8, 64), torch.randn(2, 4, 8, 64), torch.randn(2, 4, 8, 64)
    out, _ = attend(query=q, key=k, value=v, attention_mask=mask, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None, None], scale=0.125
    )
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_mask_functions():
    lengths = dict(batch_size=2, q_length=40, kv_length=40)
    ones = torch.ones(2, 40, dtype=torch.bool)
    assert integration.attention_mask(**lengths) is None
    assert integration.attention_mask(**lengths, attention_mask=ones) is None
    window = sliding_window_causal_mask_function(9)
    assert integration.attention_mask(**lengths, mask_function=window, local_size=9) is None
    static = integration.attention_mask(2, 4, 64, q_offset=torch.tensor(6))
    assert static.shape == (2, 10) and static.all()
    again = integration.attention_mask(2, 4, 64, q_offset=6, attention_mask=static)
    assert torch.equal(again, static)

    def odd(batch_idx, head_idx, q_idx, kv_idx):
        return causal_mask_function(batch_idx, head_idx, q_idx, kv_idx) & (kv_idx != 3)

    chunks = chunked_causal_mask_function(9, torch.zeros(2, dtype=torch.int64))
    for function, local_size in ((chunks, 9), (odd, None), (odd, 40), (window, 8)):
        with pytest.raises(NotImplementedError, match="masks other than"):
            integration.attention_mask(**lengths, mask_function=function, local_size=local_size)


@torch.no_grad()
def test_models_refuse_too():
    model, ids = with_implementation(llama(), "attnsieve"), tokens(1, 16)
    with pytest.raises(NotImplementedError, match="custom masks"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 16, 16))
    with pytest.raises(NotImplementedError, match="packed"):
        packed = torch.cat([torch.arange(7), torch.arange(9)])[None]
        model(input_ids=ids, position_ids=packed, use_cache=False)
    with pytest.raises((NotImplementedError, ValueError), match="output_attentions"):
        model(input_ids=ids, output_attentions=True)


def test_training_is_refused():
    model = with_implementation(llama(attention_dropout=0.1), "attnsieve")
    with pytest.raises(NotImplementedError, match="gradients"):
        model.requires_grad_(True)(input_ids=tokens(1, 16))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="dropout"):
        model.train()(input_ids=tokens(1, 16))


@pytest.mark.parametrize("options", [dict(causal=True), dict(window=(20, 5)), dict()])
def test_block_mass_is_the_mean_attention_weight(options):
    q, k = torch.randn(1, 2, 100, 64), torch.randn(1, 1, 130, 64)
    rows, columns = torch.arange(100)[:, None] + 30, torch.arange(130)
    left, right = options.get("window", (130, 130))
    seen = (columns >= rows - left) & (columns <= rows + (0 if "causal" in options else right))
    weights = (q @ k.transpose(-1, -2) / 8).masked_fill(~seen, -torch.inf).softmax(-1)
    expected = [
        [part.sum(-1).mean(-1) for part in block.split(64, dim=-1)]
        for block in weights.split(64, dim=-2)
    ]
    expected = torch.stack([torch.stack(row, dim=-1) for row in expected], dim=-2)
    torch.testing.assert_close(block_mass(q, k, **options), expected, rtol=1e-5, atol=1e-6)
