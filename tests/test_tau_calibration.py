"""SALE's thresholds: the search keeps its promise for every head, the file, and the command."""

import json
import math

import pytest
import torch

import attnsieve
from attnsieve import reference
from attnsieve.methods import SALE
from attnsieve.tau_calibration import TauCalibration, search_tau
from cases import DTYPES, randn


def layer(device):
    """Heads from peaked to flat, so that each needs another tau."""
    q, k, v = (randn((1, h, 700, 64), torch.float32, seed=h) for h in (4, 2, 2))
    q = q * torch.tensor([0.3, 1.0, 2.0, 4.0])[:, None, None]
    return [x.to(DTYPES[device][0]).to(device) for x in (q, k, v)]


def errors_at(taus, q, k, v, metric, options):
    """Of each head, in float64 over the blocks that these thresholds keep."""
    index = attnsieve.select_estimated(q, k, v, tau=taus.float().to(q.device), **options)
    out = reference.block_sparse_attention(q, k, v, index, causal=True).cpu()
    dense = reference.block_sparse_attention(q, k, v, causal=True).cpu()
    difference = (out - dense)[0].flatten(1)
    if metric == "absolute":
        return difference.abs().sum(1) / q.shape[2]
    return difference.norm(dim=1) / dense[0].flatten(1).norm(dim=1)


@pytest.mark.parametrize("metric, budget", [("relative", 0.3), ("absolute", 1.0)])
def test_search_finds_the_largest_of_the_halves(device, metric, budget):
    q, k, v = layer(device)
    options = dict(block_k=16, local_tokens=64)
    taus, found = search_tau(q, k, v, budget=budget, metric=metric, start=4.0, end=0.02, **options)
    assert 3 <= len(set(taus.tolist()))
    steps = [4.0 * 0.5**i for i in range(8)]
    true = errors_at(taus, q, k, v, metric, options)
    # On CUDA the outputs are rounded to 16 bits, the oracle's are not.
    rounding = 1e-3 if device == "cpu" else 5e-3
    torch.testing.assert_close(found, true, rtol=0.05, atol=rounding)
    for head, tau in enumerate(taus.tolist()):
        assert tau == 0 or tau in steps
        assert true[head] < budget * 1.01
        if tau == steps[0]:
            continue
        before = steps[steps.index(tau) - 1] if tau else steps[-1]
        at = torch.full((4,), before, dtype=torch.float64)
        assert errors_at(at, q, k, v, metric, options)[head] >= budget * 0.99


def test_search_gives_up_as_dense():
    q, k, v = layer("cpu")
    taus, errors = search_tau(q, k, v, budget=1e-9, start=1e6, end=1e5, local_tokens=64)
    assert not taus.any() and (errors < 1e-6).all()


@pytest.mark.parametrize(
    "wrong", [dict(metric="mean"), dict(budget=0.0), dict(start=0.1, end=0.2), dict(end=0.0)]
)
def test_search_mistakes(wrong):
    q, k, v = layer("cpu")
    with pytest.raises(ValueError, match="metric" if "metric" in wrong else "nothing to search"):
        search_tau(q, k, v, **dict(budget=0.1) | wrong)


@pytest.fixture
def calibration() -> TauCalibration:
    taus = ((0.0, 0.02, 0.2, 1e9), (0.1, 0.1, 0.0, 0.5))
    errors = ((0.0, 0.01, 0.02, 0.04), (0.03, 0.03, 0.0, 0.01))
    return TauCalibration(
        "a model", "0.1.0", "relative", 0.05, (500,), taus, errors, local_tokens=64, row_stride=2
    )


def test_round_trip(calibration, tmp_path):
    calibration.save(tmp_path / "sale.json")
    assert TauCalibration.load(tmp_path / "sale.json") == calibration


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x: x.pop("taus"), "missing taus"),
        (lambda x: x.update(more=1), "unknown more"),
        (lambda x: x.update(schema=2), "schema"),
        (lambda x: x.update(metric="mean"), "metric"),
        (lambda x: x["errors"].pop(), "same heads"),
        (lambda x: x["taus"][0].__setitem__(1, -1.0), "taus: expected"),
        (lambda x: x["taus"][0].__setitem__(1, math.nan), "taus: expected"),
        (lambda x: x["taus"][0].__setitem__(1, None), "not a calibration"),
        (lambda x: x.update(taus=3), "not a calibration"),
    ],
    ids=range(9),
)
def test_files_that_are_no_calibration(calibration, tmp_path, spoil, message):
    file = tmp_path / "sale.json"
    calibration.save(file)
    record = json.loads(file.read_text())
    spoil(record)
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as raised:
        TauCalibration.load(file)
    assert str(file) in str(raised.value)


def test_the_method_takes_each_layers_thresholds(calibration, device):
    q, k, v = layer(device)
    method = SALE.calibrated(calibration)
    for number, taus in enumerate(calibration.taus):
        found = method.select(q, k, causal=True, layer_idx=number)
        for head, tau in enumerate(taus):
            own = attnsieve.select_estimated(q, k, v, tau=tau, **calibration.estimate)
            assert torch.equal(own.counts[:, head], found.counts[:, head])
    for bad in (None, 2, -1):
        with pytest.raises(ValueError, match="layer_idx"):
            method.select(q, k, causal=True, layer_idx=bad)
    with pytest.raises(ValueError, match="2 heads"):
        method.select(q[:, :2], k, causal=True, layer_idx=0)


class TestCommand:
    @pytest.fixture(autouse=True)
    def model(self, tmp_path):
        pytest.importorskip("transformers")
        tiny_models = pytest.importorskip("tiny_models")
        tokens = dict(vocab_size=51, pad_token_id=None, bos_token_id=None)
        model = tiny_models.llama(**tokens, initializer_range=0.08)
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(len(tiny_models.WORDS), (700,), generator=generator).tolist()
        text = tmp_path / "text.txt"
        text.write_text(" ".join(tiny_models.WORDS[word] for word in words))
        self.file = tmp_path / "sale.json"
        self.arguments = ["--model", tiny_models.save(model, tmp_path / "model")]
        self.arguments += ["--text", str(text), "--device", "cpu", "-o", str(self.file)]

    def run(self, *options):
        from attnsieve.__main__ import main

        return main(["calibrate", "sale", *self.arguments, *options])

    def test_writes_what_it_found(self, capsys):
        options = ["--lengths", "512,640", "--start", "2", "--end", "0.01", "--budget", "0.2"]
        assert self.run(*options, "--block-k", "16", "--row-stride", "2", "--bits", "8") == 0
        found = TauCalibration.load(self.file)
        assert (found.model, found.lengths, found.budget) == ("model", (512, 640), 0.2)
        assert (found.bits, found.block_k, found.row_stride) == (8, 16, 2)
        assert [len(taus) for taus in found.taus] == [4, 4]
        assert all(error < 0.2 for errors in found.errors for error in errors)
        said = capsys.readouterr().out
        assert str(self.file) in said and "dense heads" in said and "640" in said

    def test_mistakes(self, capsys):
        assert self.run("--lengths", "800") == 2
        assert "need 800" in capsys.readouterr().err
        assert self.run("--lengths", "512", "--end", "1") == 2
        assert "nothing to search" in capsys.readouterr().err
        assert not self.file.exists()
        for option, value in (("--lengths", "0"), ("--budget", "-1"), ("--bits", "5")):
            with pytest.raises(SystemExit) as stopped:
                self.run(option, value)
            assert stopped.value.code == 2 and option in capsys.readouterr().err
