"""What an installed package owes its user before any attention: import, build facts, doctor."""

import subprocess
import sys

import pytest
import torch

import attnsieve

PUBLIC = (
    "BlockIndex",
    "TokenIndex",
    "append_kv",
    "block_sparse_attention",
    "build_info",
    "decode",
    "estimate_block_scores",
    "LowRankFit",
    "low_rank_attention",
    "lowrank_fit",
    "lowrank_step",
    "merge_states",
    "pooled_block_scores",
    "proxy_scores",
    "quantize_blocks",
    "quantized_estimate_attention",
    "reference",
    "select_blocks",
    "select_estimated",
    "select_from_scores",
    "select_marked",
    "select_threshold",
    "select_topk",
    "threshold_attention",
)


def need_info_module():
    reason = "attnsieve._C was not built for this Python; the ops work without it"
    pytest.importorskip("attnsieve._C", reason=reason)


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    assert (getattr(attnsieve, name).__doc__ or "").strip(), f"attnsieve.{name} has no docstring"


def test_build_info():
    need_info_module()
    info = attnsieve.build_info()
    assert isinstance(info, dict) and info


def test_doctor_runs():
    need_info_module()
    done = python("-m", "attnsieve", "doctor")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout


def test_import_is_light():
    """Nothing heavy beyond torch itself, and no pybind11 module before it is asked for."""
    heavy = ("transformers", "matplotlib", "pandas", "torch._dynamo", "attnsieve._C")
    code = (
        "import torch, sys; before = set(sys.modules); import attnsieve; "
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_one_op_after_install(device):
    q = torch.randn(1, 2, 64, 64, device=device, dtype=torch.bfloat16)
    assert attnsieve.block_sparse_attention(q, q, q).isfinite().all()
