"""Calibrations: the fit, their file, the methods that use them, and the command that writes one."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace

import numpy
import pytest
import torch

import attnsieve
from attnsieve.calibration import Calibration, Check, Point, fit
from attnsieve.methods import Threshold, ThresholdDecode
from cases import randn

A, B = 7.9, 8.6


def points(noise=0.0, shares=(0.12, 0.3, 0.5, 0.7, 0.88)) -> list[Point]:
    """Points of F = A exp(B S) at two lengths, ``noise`` in ln F apart."""
    offsets = {1024: -noise, 4096: noise}
    return [
        Point(length, A * math.exp(B * share + offset), share)
        for length, offset in offsets.items()
        for share in shares
    ]


@pytest.fixture
def calibration() -> Calibration:
    checks = (Check(1024, 0.5, A * math.exp(B * 0.5), 0.47),)
    phases = dict(prefill=replace(fit(points(0.1)), checks=checks), decode=fit(points()))
    return Calibration("a model", "0.1.0", 128, 64, 4, phases)


def test_fit_recovers_the_curve():
    exact = fit(points())
    assert (exact.a, exact.b) == (pytest.approx(A), pytest.approx(B))
    assert exact.rms_log_scale < 1e-9 and exact.max_share_error < 1e-9
    assert exact.lengths == (1024, 4096) and exact.largest_share == 0.88
    noisy = fit(points(0.1))
    assert (noisy.a, noisy.b) == (pytest.approx(A), pytest.approx(B))
    assert noisy.rms_log_scale == pytest.approx(0.1)
    assert noisy.max_share_error == pytest.approx(0.1 / B)


def test_fit_is_least_squares_and_leaves_extremes_out():
    generator = numpy.random.default_rng(0)
    shares = generator.uniform(0.1, 0.9, 20)
    logs = 2 + 5 * shares + generator.normal(0, 0.3, 20)
    used = [Point(512, float(numpy.exp(x)), float(s)) for s, x in zip(shares, logs, strict=True)]
    design = numpy.stack([numpy.ones(20), shares], 1)
    (log_a, b), (squares,) = numpy.linalg.lstsq(design, logs, rcond=None)[:2]
    extremes = [Point(512, 1e-6, 0.05), Point(512, 1e6, 0.0), Point(512, 1.0, 0.95)]
    found = fit([*used, *extremes])
    assert (found.a, found.b) == (pytest.approx(numpy.exp(log_a)), pytest.approx(b))
    assert found.rms_log_scale == pytest.approx(math.sqrt(squares / 20))
    assert found.points == (*used, *extremes)


@pytest.mark.parametrize(
    "bad, message",
    [
        ([], "0 of 0 have shares"),
        ([Point(64, 1.0, 0.5), Point(64, 9.0, 0.5), Point(64, 2.0, 0.01)], "2 of 3 have shares"),
        ([Point(64, 9.0, 0.3), Point(64, 1.0, 0.5)], "do not grow"),
    ],
)
def test_points_without_a_fit(bad, message):
    with pytest.raises(ValueError, match=message):
        fit(bad)


def test_scale(calibration):
    assert calibration.scale("decode", 0.5) == pytest.approx(A * math.exp(B * 0.5))
    assert calibration.scale("decode", 0.92) == pytest.approx(A * math.exp(B * 0.92))
    for sparsity in (0.0, 1.0, -0.1, math.nan, True, "0.5"):
        with pytest.raises(ValueError, match=r"sparsity: expected a share in \(0, 1\)"):
            calibration.scale("prefill", sparsity)
    with pytest.raises(ValueError, match="0.94 lies outside .* share is 0.880"):
        calibration.scale("prefill", 0.94)
    alone = replace(calibration, phases={"decode": calibration.phases["decode"]})
    with pytest.raises(ValueError, match="'prefill' is not calibrated for a model, only decode"):
        alone.scale("prefill", 0.5)
    with pytest.raises(ValueError, match="'training' is not calibrated"):
        calibration.scale("training", 0.5)


def test_round_trip(calibration, tmp_path):
    file = tmp_path / "calibration.json"
    calibration.save(file)
    assert Calibration.load(file) == calibration
    assert Calibration.load(str(file)).phases["prefill"].checks[0].share == 0.47
    assert hash(calibration) == hash(Calibration.load(file))


def _without(record, *path):
    for key in path[:-1]:
        record = record[key]
    del record[path[-1]]


def _with(value, record, *path):
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = value


POINT = ("phases", "decode", "points", 2)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: _with(2, r, "schema"), "schema: expected 1, got 2"),
        (lambda r: _without(r, "schema"), "schema: expected 1, got None"),
        (lambda r: _without(r, "skip_block"), "missing skip_block"),
        (lambda r: _with(1, r, "sink"), "unknown sink"),
        (lambda r: _with(3, r, "model"), "model: expected a text, got 3"),
        (lambda r: _with(64.0, r, "group_rows"), "group_rows: expected a positive integer"),
        (lambda r: _with(0, r, "num_splits"), "num_splits: expected a positive integer"),
        (lambda r: _with([], r, "phases"), "phases: expected an object"),
        (lambda r: _with({}, r, "phases", "x"), "phases.x: missing a, b, checks, max_share"),
        (
            lambda r: _with(r["phases"].pop("decode"), r, "phases", "train"),
            r"phases: expected none but prefill, decode, got \['train'\]",
        ),
        (lambda r: _with(-1, r, "phases", "decode", "a"), "phases.decode: a: expected a positive"),
        (lambda r: _with(math.nan, r, "phases", "decode", "b"), "b: expected a positive number"),
        (lambda r: _with(None, r, "phases", "decode", "points"), "decode.points: expected a list"),
        (lambda r: _with([], r, "phases", "decode", "points"), "points: expected at least one"),
        (lambda r: _with(7, r, *POINT), r"phases.decode.points\[2\]: expected an object, got 7"),
        (lambda r: _with(1.5, r, *POINT, "share"), r"points\[2\]: share: expected a number from 0"),
        (lambda r: _with(True, r, *POINT, "length"), r"points\[2\]: length: expected a positive"),
        (lambda r: _without(r, *POINT, "scale"), r"points\[2\]: missing scale"),
        (
            lambda r: _with("x", r, "phases", "prefill", "checks", 0, "target"),
            r"phases.prefill.checks\[0\]: target: expected a number from 0 to 1, got 'x'",
        ),
    ],
)
def test_files_that_are_no_calibration(calibration, tmp_path, spoil, message):
    file = tmp_path / "calibration.json"
    calibration.save(file)
    record = json.loads(file.read_text())
    spoil(record)
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"calibration.json: not a calibration: .*{message}"):
        Calibration.load(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_files_that_are_no_object(tmp_path, content):
    file = tmp_path / "calibration.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="calibration.json: not a calibration"):
        Calibration.load(file)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "missing.json")


def test_threshold_by_target(calibration):
    by_target = Threshold(target_sparsity=0.3, calibration=calibration)
    scale = calibration.scale("prefill", 0.3)
    assert by_target.threshold(1000) == scale / 1000
    assert by_target == replace(by_target) and isinstance(hash(by_target), int)
    q, k, v = (randn((1, 2, 512, 64), seed=seed) for seed in range(3))
    got, want = (method(q, k, v, causal=True) for method in (by_target, Threshold(scale)))
    assert torch.equal(got, want)


def test_threshold_mistakes(calibration):
    both = dict(target_sparsity=0.3, calibration=calibration)
    for wrong in ({}, dict(scale=1.0, **both)):
        with pytest.raises(ValueError, match="either scale or target_sparsity"):
            Threshold(**wrong)
    for wrong in (dict(target_sparsity=0.3), dict(scale=1.0, calibration=calibration)):
        with pytest.raises(ValueError, match="go together"):
            Threshold(**wrong)
    with pytest.raises(ValueError, match="skip_block: the calibration is of 128 keys"):
        Threshold(**both, skip_block=64)
    with pytest.raises(ValueError, match="0.99 lies outside"):
        Threshold(target_sparsity=0.99, calibration=calibration)


def test_threshold_decode_divides_by_each_length(monkeypatch):
    """The call of the op; what it computes is the op's own test."""
    calls = []

    def record(q, k, v, threshold, **options):
        calls.append((threshold, options))
        return (q, "counters") if options.get("return_counters") else q

    monkeypatch.setattr("attnsieve.methods.threshold.threshold_attention", record)
    q, k = torch.zeros(2, 4, 1, 64), torch.zeros(2, 2, 32, 64)
    lens = torch.tensor([20, 0], dtype=torch.int32)
    sink = torch.zeros(4)
    cache = attnsieve.CachedKV(k, k, seq_lens=lens)
    method = ThresholdDecode(10.0, two_phase=True, num_splits=3)
    assert method(q, cache, layer_idx=5, softmax_scale=0.5, sink=sink) is q
    assert method.counted(q, cache) == (q, "counters")
    ThresholdDecode(10.0)(q, attnsieve.CachedKV(k, k))
    (first, options), (second, counted), (third, plain) = calls
    assert first.tolist() == second.tolist() == [[0.5], [10.0]]
    assert first.dtype == torch.float32 and third.tolist() == [[10 / 32]] * 2
    assert options["seq_lens"] is lens and options["sink"] is sink
    assert (options["phase"], options["causal"], options["softmax_scale"]) == ("decode", True, 0.5)
    assert (options["two_phase"], options["num_splits"]) == (True, 3)
    assert (plain["two_phase"], plain["num_splits"]) == (False, None)
    assert counted["return_counters"] and not options.get("return_counters")


class TestCommand:
    """``attnsieve calibrate`` on the tiny model of the demo's tests."""

    @pytest.fixture(autouse=True)
    def _setting(self, tmp_path, monkeypatch):
        pytest.importorskip("transformers")
        import tiny_models

        tokens = dict(vocab_size=51, bos_token_id=None, pad_token_id=None)
        # Logits that spread enough for shares between none and all.
        model = tiny_models.llama(**tokens, initializer_range=0.08)
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(len(tiny_models.WORDS), (700,), generator=generator).tolist()
        text = tmp_path / "text.txt"
        text.write_text(" ".join(tiny_models.WORDS[word] for word in words))
        folder = tiny_models.save(model, tmp_path / "model")
        self.file = tmp_path / "calibration.json"
        self.arguments = ["--model", folder, "--text", str(text), "--device", "cpu"]
        self.arguments += ["--out", str(self.file)]

    def run(self, *options: str) -> int:
        from attnsieve.__main__ import main

        return main(["calibrate", *self.arguments, *options])

    def test_prefill(self, tmp_path, capsys):
        picture = tmp_path / "sweep.png"
        scales = "1000,2000,6000,100000"
        options = ["--lengths", "384,640", "--phases", "prefill", "--scales", scales]
        assert self.run(*options, "--targets", "0.3,0.99", "--plot", str(picture)) == 0
        said = capsys.readouterr().out
        assert str(self.file) in said and picture.read_bytes().startswith(b"\x89PNG")
        found = Calibration.load(self.file)
        assert (found.model, found.version) == ("model", attnsieve.__version__)
        assert (found.skip_block, found.group_rows, list(found.phases)) == (128, 64, ["prefill"])
        swept = found.phases["prefill"]
        assert [x.length for x in swept.points] == [384] * 4 + [640] * 4
        assert [x.scale for x in swept.points[:4]] == [1000, 2000, 6000, 100000]
        for row in (swept.points[:4], swept.points[4:]):
            shares = [x.share for x in row]
            assert shares == sorted(shares)
        # 10 groups of rows visit 1, 1, .. 5, 5 tiles and skip all but the first ones.
        assert swept.largest_share == pytest.approx(20 / 30)
        assert swept == replace(fit(swept.points), checks=swept.checks)
        assert "0.99 lies outside" in said
        assert [(x.length, x.target) for x in swept.checks] == [(384, 0.3), (640, 0.3)]
        for x in swept.checks:
            assert x.scale == found.scale("prefill", 0.3) and f"{x.share:.3f}" in said

    def test_both_phases(self, capsys):
        options = ["--lengths", "520", "--steps", "3", "--targets", "0.4", "--num-splits", "2"]
        options += ["--scales", "1000,2000,6000", "--decode-scales", "100,300,1000,3000"]
        assert self.run(*options) == 0
        found = Calibration.load(self.file)
        assert list(found.phases) == ["prefill", "decode"] and found.num_splits == 2
        decode = found.phases["decode"]
        assert decode.points[0].share < decode.points[-1].share
        assert decode.checks[0].scale == found.scale("decode", 0.4)
        assert "decode: model, float32, cpu" in capsys.readouterr().out

    def test_without_matplotlib(self, tmp_path, capsys, monkeypatch):
        find, picture = importlib.util.find_spec, tmp_path / "sweep.png"
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
        )
        options = ["--lengths", "384", "--phases", "prefill", "--scales", "1000,2000"]
        assert self.run(*options, "--plot", str(picture)) == 0
        assert "matplotlib is not installed" in capsys.readouterr().out
        assert self.file.exists() and not picture.exists()

    def test_mistakes(self, capsys, tmp_path):
        def line(*options: str) -> str:
            assert self.run(*options) == 2
            lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("[")]
            assert len(lines) == 1 and lines[0].startswith("attnsieve calibrate: ")
            return lines[0]

        assert "prefill: points: 0 of 1" in line(
            "--lengths", "256", "--phases", "prefill", "--scales", "1e-9"
        )
        assert "need 800" in line("--lengths", "800")
        assert "no such folder" in line("--out", str(tmp_path / "missing" / "x.json"))
        assert "5 decode steps" in line("--phases", "decode", "--lengths", "6", "--steps", "5")
        assert not self.file.exists()

    @pytest.mark.parametrize(
        "option, value",
        [
            ("--lengths", "0"),
            ("--lengths", "1024;2048"),
            ("--phases", "prefill,training"),
            ("--scales", "0"),
            ("--decode-scales", "inf"),
            ("--targets", "1"),
        ],
    )
    def test_bad_options(self, option, value, capsys):
        with pytest.raises(SystemExit) as stopped:
            self.run(option, value)
        assert stopped.value.code == 2 and option in capsys.readouterr().err
