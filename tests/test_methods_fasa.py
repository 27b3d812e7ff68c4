"""FASA attends to what a few pairs of dims rank best; the rules are in ``decode_rules.py``."""

import dataclasses
import json

import pytest
import torch

from attnsieve import CachedKV
from attnsieve.fasa_calibration import FASACalibration, contextual_agreement, dominant_dims
from attnsieve.methods import FASA, DenseDecode
from attnsieve.ops_topk import topk_attention
from attnsieve.rotary import from_pairs, to_pairs
from cases import randn
from decode_rules import fasa, fasa_hits, pair_dims
from numerics import assert_bitwise
from test_methods_decode import FIRST, HEADS, LAYERS, STEPS, TOLERANCE, Steps, check

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True])
SHARES = pytest.mark.parametrize("share", ["kv_head", "query_head"])


def prompt_of(steps):
    """Queries of all layers."""
    shape = (LAYERS, 2, steps.heads[0], FIRST, 64)
    return randn(shape, steps.k.dtype, steps.k.device, 4)


def prefilled(steps, **options):
    """FASA after a prefill of all layers."""
    method, prompt = FASA(30, pairs=8, recent=2, topk=20, rows=4, **options), prompt_of(steps)
    for layer in range(LAYERS):
        method.prefill(prompt[layer], steps.k[layer, :, :, :FIRST], layer_idx=layer)
    return method


def pairs_of(agreement, count):
    """The ``count`` best pairs of each head."""
    return [sorted(range(len(x)), key=lambda i: (-float(x[i]), i))[:count] for x in agreement]


@LAYOUTS
@pytest.mark.parametrize("heads", HEADS)
def test_agreement_is_the_shared_part_of_the_best_keys(heads, interleaved):
    q, k = randn((2, heads[0], 90, 16), seed=1), randn((2, heads[1], 100, 16), seed=2)
    options = dict(topk=9, rows=5, interleaved=interleaved)
    own = contextual_agreement(q, k, share="query_head", **options)
    shared = contextual_agreement(q, k, **options)
    for b in range(2):
        hits, most = fasa_hits(q[b].double(), k[b].double(), 9, 5, interleaved)
        want = hits / most
        torch.testing.assert_close(own[b], want, rtol=1e-5, atol=1e-6)
        want = want.unflatten(0, (heads[1], -1)).mean(1)
        torch.testing.assert_close(shared[b], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_agreement_of_short_texts(length):
    q, k = randn((1, 2, length, 16), seed=1), randn((1, 1, length, 16), seed=2)
    hits, most = fasa_hits(q[0].double(), k[0].double(), 256, 16)
    got = contextual_agreement(q, k, share="query_head")[0]
    torch.testing.assert_close(got, hits / most, rtol=1e-5, atol=1e-6)


@LAYOUTS
def test_dominant_dims_are_those_of_the_best_pairs(interleaved):
    agreement = randn((2, 3, 16), seed=3).abs().clamp(max=1)
    agreement[0, 0] = 0.5  # equal ones: the lower pairs
    dims = dominant_dims(agreement, 8, interleaved)
    for b in range(2):
        for h, pairs in enumerate(pairs_of(agreement[b], 8)):
            want = {d for pair in pairs for d in pair_dims(pair, 32, interleaved)}
            assert len(dims[b, h]) == 16 and set(dims[b, h].tolist()) == want


@LAYOUTS
def test_pairs_and_back(interleaved):
    x = randn((3, 32))
    pairs = to_pairs(x, interleaved)
    assert torch.equal(from_pairs(pairs, interleaved), x)
    for pair in range(16):
        assert torch.equal(pairs[:, pair], x[:, list(pair_dims(pair, 32, interleaved))])


@LAYOUTS
@SHARES
@pytest.mark.parametrize("heads", HEADS)
def test_fasa(heads, share, interleaved):
    steps = Steps(heads)
    method, pairs = prefilled(steps, share=share, interleaved=interleaved), {}
    prompt = prompt_of(steps)

    def rule(step, layer, b):
        if (layer, b) not in pairs:
            text = prompt[layer, b].double(), steps.k[layer, b, :, :FIRST].double()
            hits, _ = fasa_hits(*text, 20, 4, interleaved)
            if share == "kv_head":
                hits = hits.unflatten(0, (heads[1], -1)).sum(1)
            pairs[layer, b] = pairs_of(hits, 8)
        q, k, _ = steps.of(step, layer, b)
        return fasa(q, k, pairs[layer, b], 30, 2, interleaved)

    check(steps, method, rule)


@LAYOUTS
def test_all_pairs_choose_what_exact_logits_do(device, interleaved):
    steps = Steps((6, 3), device, torch.float32 if device == "cpu" else torch.bfloat16)
    method = FASA(30, pairs=32, recent=2, interleaved=interleaved)
    for layer in range(LAYERS):
        keys = steps.k[layer, :, :, :FIRST]
        method.prefill(keys.repeat_interleave(2, 1), keys, layer_idx=layer)

    def exact(q, cache, layer_idx):
        options = dict(k=30, score="exact", recent_tokens=2)
        return topk_attention(q, cache.k_cache, cache.v_cache, **options)

    torch.testing.assert_close(steps.run(method), steps.run(exact), **TOLERANCE[device])


def test_without_a_prefill_is_dense():
    steps = Steps((6, 3))
    assert_bitwise(steps.run(FASA(30)), steps.run(DenseDecode()))


@SHARES
def test_in_pages_again_and_of_one_sequence(device, share):
    steps = Steps((6, 3), device, torch.float32 if device == "cpu" else torch.bfloat16)
    method = prefilled(steps, share=share)
    plain = steps.run(method)
    assert len(method.state) == LAYERS
    method.reset()
    assert not method.state
    pages = steps.run(method, steps.paged(torch.nan))
    torch.testing.assert_close(pages, plain, **TOLERANCE[device])
    assert_bitwise(steps.run(prefilled(steps, share=share)), plain)
    one = Steps((6, 3), device, steps.k.dtype)
    one.q, one.k, one.v = steps.q[:, :, 1:], steps.k[:, 1:], steps.v[:, 1:]
    method = prefilled(steps, share=share)
    method.dims = {place: dims[1:] for place, dims in method.dims.items()}
    torch.testing.assert_close(one.run(method), plain[:, :, 1:], **TOLERANCE[device])


def test_a_later_piece_keeps_what_the_first_taught():
    """Its keys are new all the same: what is beside the cache is made again."""
    steps, piece = Steps((6, 3)), slice(FIRST - 9, FIRST)
    method = prefilled(steps)
    learned = dict(method.dims)
    for layer in range(LAYERS):
        cache = CachedKV(*(x[layer, :, :, : FIRST - 9] for x in (steps.k, steps.v)))
        method(steps.q[0, layer], cache, layer_idx=layer)
        q, k = randn((2, 6, 9, 64)), steps.k[layer][:, :, piece]
        method.prefill(q, k, layer_idx=layer, begin=FIRST - 9)
    assert all(method.dims[place] is kept for place, kept in learned.items())
    assert_bitwise(steps.run(method), steps.run(prefilled(steps)))


def test_new_tokens_in_the_place_of_rejected_ones_are_seen():
    steps = Steps((6, 3))
    method, q = prefilled(steps), randn((2, 6, 3, 64), seed=9)
    k = steps.k[0].clone()

    def step(rows, length):
        return method(q[:, :, :rows], CachedKV(k[:, :, :length], steps.v[0][:, :, :length]))

    step(1, FIRST)
    step(3, FIRST + 3)
    k[:, :, FIRST:] = randn((2, 3, STEPS, 64), seed=10)
    again = step(3, FIRST + 3)
    method.reset()
    assert_bitwise(step(3, FIRST + 3), again)


def test_rows_of_a_draft_do_not_see_later_ones():
    steps = Steps((6, 3))
    q, outs = randn((2, 6, 4, 64), seed=5), []
    for poison in (0.0, 3.0):
        method, k = prefilled(steps), steps.k[0].clone()
        k[:, :, -1] += poison
        outs.append(method(q, CachedKV(k, steps.v[0]))[:, :, :3])
    assert_bitwise(*outs)


def calibration_of(steps, **options):
    q, k = prompt_of(steps)[:, :1], steps.k[:, :1, :, :FIRST]
    tables = [
        contextual_agreement(q[x], k[x], topk=20, rows=4, **options)[0] for x in range(LAYERS)
    ]
    named = dict(share="kv_head", interleaved=False) | options
    agreement = tuple(tuple(tuple(head) for head in table.tolist()) for table in tables)
    return FASACalibration("m", "0", 20, 4, **named, lengths=(FIRST,), agreement=agreement)


@LAYOUTS
@SHARES
def test_a_calibration_says_what_a_prefill_of_its_text_finds(tmp_path, share, interleaved):
    steps = Steps((6, 3))
    options = dict(share=share, interleaved=interleaved)
    calibration_of(steps, **options).save(tmp_path / "fasa.json")
    calibration = FASACalibration.load(tmp_path / "fasa.json")
    assert calibration == calibration_of(steps, **options)
    method = FASA.calibrated(calibration, k=30, pairs=8, recent=2)
    got = steps.run(method)
    method.prefill(prompt_of(steps)[0], steps.k[0, :, :, :FIRST])
    assert 0 not in [layer for _, layer in method.state]
    learned = prefilled(steps, **options)
    learned.dims = {place: dims[:1] for place, dims in learned.dims.items()}
    assert_bitwise(got, steps.run(learned))


def test_bad_calibrations_are_named(tmp_path):
    calibration, file = calibration_of(Steps((6, 3))), tmp_path / "fasa.json"
    record = {"schema": 1, **dataclasses.asdict(calibration)}
    for change, said in (
        (dict(schema=2), "schema"),
        (dict(share="head"), "share"),
        (dict(extra=1), "unknown extra"),
        (dict(agreement=[[[0.5, 2.0]]]), "agreement"),
        (dict(agreement=[[[0.5]], [[0.5], [0.5]]]), "agreement"),
    ):
        file.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=f"not a calibration: .*{said}"):
            FASACalibration.load(file)


def test_bad_parameters_are_named():
    q, k = randn((1, 4, 1, 64)), randn((1, 2, 40, 64))
    for pairs in (0, 6, 36):
        with pytest.raises(ValueError, match="pairs"):
            FASA(pairs=pairs).prefill(q, k)
    with pytest.raises(ValueError, match="recent"):
        FASA(recent=0)
    with pytest.raises(ValueError, match="share"):
        FASA(share="head").prefill(q, k)
    for name, bad in (("rows", dict(rows=0)), ("topk", dict(topk=0))):
        with pytest.raises(ValueError, match=name):
            contextual_agreement(q, k, **bad)
    for name, args in (("k", (q, k[:, :, :, :32])), ("k", (q[:, :3], k)), ("q", (k, k[:, :, :3]))):
        with pytest.raises(ValueError, match=f"^{name}: "):
            contextual_agreement(*args)
    calibration = calibration_of(Steps((6, 3)))
    with pytest.raises(ValueError, match="interleaved"):
        FASA(calibration=calibration, interleaved=True)
    with pytest.raises(ValueError, match="calibration"):
        FASA.calibrated(calibration)(q, CachedKV(k, k))
    with pytest.raises(ValueError, match="layer_idx"):
        FASA.calibrated(calibration)(q, CachedKV(k, k), layer_idx=9)


class TestCommand:
    @pytest.fixture(autouse=True)
    def model(self, tmp_path):
        pytest.importorskip("transformers")
        tiny_models = pytest.importorskip("tiny_models")
        tokens = dict(vocab_size=51, pad_token_id=None, bos_token_id=None)
        model = tiny_models.llama(**tokens, initializer_range=0.08)
        words = torch.randint(len(tiny_models.WORDS), (300,), generator=torch.Generator())
        text = tmp_path / "text.txt"
        text.write_text(" ".join(tiny_models.WORDS[word] for word in words.tolist()))
        self.file = tmp_path / "fasa.json"
        self.arguments = ["--model", tiny_models.save(model, tmp_path / "model")]
        self.arguments += ["--text", str(text), "--device", "cpu", "-o", str(self.file)]

    def run(self, *options):
        from attnsieve.__main__ import main

        return main(["calibrate", "fasa", *self.arguments, *options])

    def test_writes_what_it_found(self, capsys):
        tables = {}
        for lengths in ("200", "256", "200,256"):
            assert self.run("--lengths", lengths, "--topk", "20", "--rows", "8") == 0
            tables[lengths] = FASACalibration.load(self.file)
        both = tables["200,256"]
        assert (both.model, both.lengths, both.topk, both.rows) == ("model", (200, 256), 20, 8)
        found = [torch.tensor(x.agreement) for x in tables.values()]
        assert found[2].shape == (2, 2, 32)  # layers, KV heads, pairs
        torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)
        said = capsys.readouterr().out
        assert str(self.file) in said and f"{found[2][0].amax(1).mean():.3f}" in said

    def test_mistakes(self, capsys):
        assert self.run("--lengths", "800") == 2
        assert "need 800" in capsys.readouterr().err
        assert not self.file.exists()
        with pytest.raises(SystemExit) as stopped:
            self.run("--share", "head")
        assert stopped.value.code == 2 and "--share" in capsys.readouterr().err
