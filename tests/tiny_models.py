"""Small random language models of transformers, their prompts and their padding."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast
from transformers.models.llama import LlamaForCausalLM
from transformers.models.mistral import MistralForCausalLM

SIZES = dict(
    vocab_size=97,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
WORDS = [f"w{i}" for i in range(50)]
TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=1e-4), torch.bfloat16: dict(rtol=0.1, atol=0.1)}


def build(kind, config, device: str = "cpu"):
    """A random model in evaluation mode: float32 on the CPU, bfloat16 on CUDA."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return kind(config).to(device, dtype).eval().requires_grad_(False)


def llama(device: str = "cpu", **changes):
    return build(LlamaForCausalLM, LlamaConfig(**{**SIZES, **changes}), device)


def mistral(sliding_window: int):
    return build(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=sliding_window))


def tokens(batch: int, length: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=generator).to(device)


def padding(lengths, width: int, side: str, device: str = "cpu") -> torch.Tensor:
    places = torch.arange(width, device=device)
    lengths = torch.tensor(lengths, device=device)[:, None]
    return (places >= width - lengths if side == "left" else places < lengths).long()


def with_implementation(model, name: str):
    model.set_attn_implementation(name)
    return model


def save(model, folder) -> str:
    """The model with a tokenizer of 50 words, as a folder that --model takes."""
    vocabulary = {word: place for place, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)
