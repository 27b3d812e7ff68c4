"""`python -m attnsieve doctor`: what is installed, what each op will run on, and why not."""

from __future__ import annotations

import torch

import attnsieve


def _gpu_lines(info: dict[str, str]) -> list[str]:
    if not info["cuda"]:
        return ["GPU ops          unavailable: built without CUDA (no nvcc at install time)"]
    if torch.version.cuda is None:
        return ["GPU ops          unavailable: the installed torch is a CPU-only build"]
    if not torch.cuda.is_available():
        return [
            "GPU ops          unavailable: torch sees no usable GPU (driver missing or no device)"
        ]
    lines = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        if major < 8:
            state = "unavailable: compute capability 8.0 or newer is needed"
        elif (major, minor) == (8, 0) or (major, minor) == (9, 0):
            state = "machine code compiled in"
        elif major == 8:
            state = "runs the sm_80 machine code"
        else:
            state = "runs the sm_80 PTX, compiled by the driver at first use"
        lines.append(f"cuda:{index:<11} {name}, compute capability {major}.{minor}: {state}")
    return lines


def report() -> str:
    """The whole report as text. Needs no GPU."""
    info = attnsieve.build_info()
    lines = [
        f"attnsieve        {info['version']}, kernels {info['kernel_hash']}, {info['compiler']}",
        f"CUDA backend     {'nvcc ' + info['cuda'] if info['cuda'] else 'not built'}"
        + (f", archs {info['archs']}, head_dims {info['head_dims']}" if info["cuda"] else ""),
        f"torch            {torch.__version__}, CUDA {torch.version.cuda or 'none'}; "
        f"this library needs torch >= {info['torch_target']}",
        f"CPU threads      {torch.get_num_threads()}",
        *_gpu_lines(info),
        "",
        f"{'op':<16} {'backend':<8} supported",
    ]
    for row in attnsieve.capabilities():
        lines.append(f"{row['op']:<16} {row['backend']:<8} {row['supported']}; {row['features']}")
    if info["cuda"] and torch.cuda.is_available():
        lines += ["", f"{'kernel':<58} {'regs':>4} {'local':>5} {'smem':>7} {'CTAs/SM':>7}"]
        for kernel in attnsieve.kernel_attributes():
            smem = kernel["static_shared_bytes"] + kernel["dynamic_shared_bytes"]
            lines.append(
                f"{kernel['name']:<58} {kernel['registers']:>4} {kernel['local_bytes']:>5} "
                f"{smem:>7} {kernel['ctas_per_sm']:>7}"
            )
    return "\n".join(lines)


def main() -> int:
    """Print the report."""
    print(report())
    return 0
