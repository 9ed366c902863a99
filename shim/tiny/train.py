#!/usr/bin/env python3
"""Train the model that `ferroflash-serve` carries: a 0.9 M parameter Llama on the King James Version.

The text is in the public domain; Debian ships it in the packages `bible-kjv` and `bible-kjv-text`.
`train.sh` next to this file installs what is needed and runs this script; about a quarter of an hour on
one core. The schedule is fixed and the seeds are set: the same torch on the same kind of CPU gives the same
weights, another one gives close relatives.
The output is an ordinary Hugging Face folder: config.json, model.safetensors (bf16), tokenizer.json.
"""

import argparse
import json
import math
import re
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
END_OF_TEXT = "<|endoftext|>"
# The model is no assistant: a chat is continued as plain text.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"


def kjv_text() -> str:
    """One chapter a paragraph, verses joined by a space, no verse numbers."""
    out = subprocess.run(
        ["bible", "-f", "-l", "100000", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    ).stdout
    chapters, last = [], None
    for line in out.splitlines():
        match = re.match(r"(\S+?)(\d+):(\d+) (.*)", line)
        if not match:
            continue
        key = (match[1], match[2])
        if key != last:
            chapters.append([])
            last = key
        chapters[-1].append(match[4].strip())
    return "\n".join(" ".join(chapter) for chapter in chapters)


def train_tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    return tokenizer


def init_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    c = CONFIG
    d, ff, hd = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd

    def normal(rows, cols, std=0.02):
        return torch.randn(rows, cols, generator=generator) * std

    residual_std = 0.02 / math.sqrt(2 * c["num_hidden_layers"])
    weights = {"model.embed_tokens.weight": normal(c["vocab_size"], d), "model.norm.weight": torch.ones(d)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        weights |= {
            p + "input_layernorm.weight": torch.ones(d),
            p + "self_attn.q_proj.weight": normal(q, d),
            p + "self_attn.k_proj.weight": normal(kv, d),
            p + "self_attn.v_proj.weight": normal(kv, d),
            p + "self_attn.o_proj.weight": normal(d, q, residual_std),
            p + "post_attention_layernorm.weight": torch.ones(d),
            p + "mlp.gate_proj.weight": normal(ff, d),
            p + "mlp.up_proj.weight": normal(ff, d),
            p + "mlp.down_proj.weight": normal(d, ff, residual_std),
        }
    return {name: w.requires_grad_() for name, w in weights.items()}


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def forward(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    c = CONFIG
    batch, length = ids.shape
    hd, eps = c["head_dim"], c["rms_norm_eps"]
    inv_freq = c["rope_theta"] ** (-torch.arange(0, hd, 2) / hd)
    angle = torch.outer(torch.arange(length), inv_freq)
    angle = torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos(), angle.sin()

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[name]

    def heads(x, n):
        return x.view(batch, length, n, hd).transpose(1, 2)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        q = heads(h @ w[p + "self_attn.q_proj.weight"].T, c["num_attention_heads"])
        k = heads(h @ w[p + "self_attn.k_proj.weight"].T, c["num_key_value_heads"])
        v = heads(h @ w[p + "self_attn.v_proj.weight"].T, c["num_key_value_heads"])
        o = F.scaled_dot_product_attention(
            rope(q, cos, sin), rope(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + o.transpose(1, 2).reshape(batch, length, -1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, p + "post_attention_layernorm.weight")
        gate = F.silu(h @ w[p + "mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["model.embed_tokens.weight"].T


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--steps", type=int, default=2000)
    args = args.parse_args()
    torch.manual_seed(1611)
    torch.set_num_threads(args.threads)

    text = kjv_text()
    tokenizer = train_tokenizer(text)
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for chapter in text.split("\n"):
        ids += tokenizer.encode(chapter).ids + [end]
    data = torch.tensor(ids)
    print(f"{len(text)} characters, {len(data)} tokens", flush=True)
    held_out = data[-20_000:]
    data = data[:-20_000]

    generator = torch.Generator().manual_seed(1611)
    weights = init_weights(generator)
    print(f"{sum(w.numel() for w in weights.values())} parameters", flush=True)
    decay = [w for w in weights.values() if w.dim() == 2]
    other = [w for w in weights.values() if w.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    batch, length, peak_lr = 24, 192, 4e-3
    start = time.monotonic()
    for step in range(args.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        lr = peak_lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr
        at = torch.randint(0, len(data) - length - 1, (batch,), generator=generator)
        window = torch.stack([data[i : i + length + 1] for i in at])
        logits = forward(weights, window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} lr {lr:.2e} {time.monotonic() - start:.0f} s", flush=True)

    with torch.no_grad():
        windows = held_out[: 100 * 192].view(100, 192)
        loss = F.cross_entropy(forward(weights, windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        print(f"held-out loss {loss.item():.3f} nats a token", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: w.detach().to(torch.bfloat16).contiguous() for name, w in weights.items() if w.numel()},
        args.out / "model.safetensors",
        metadata={"format": "pt"},
    )
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (args.out / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": None, "eos_token": END_OF_TEXT, "chat_template": CHAT_TEMPLATE}, indent=2) + "\n"
    )
    tokenizer.save(str(args.out / "tokenizer.json"))


if __name__ == "__main__":
    main()
