"""A GPT on the characters of Shakespeare's plays: nanoGPT's recipe for a CPU.

    distprop run -n 2 examples/char_gpt.py --text input.txt

4 layers, 4 heads, 128 wide, 64 characters of context, batches of 12, 2,000 steps of AdamW; nanoGPT reports a validation
loss of 1.88, estimated from 20 batches, at a learning rate of 0.001. With that this ends at 1.900 over all of the
validation text; with 0.002, the default here, at 1.814 on 1 rank and 1.809 on 2. The text (tiny Shakespeare, 1.1 MB) is
read from --text or $DISTPROP_DATA/tinyshakespeare/input.txt; the first 90 % train, all of the rest validates.
Source of the recipe: Andrej Karpathy, nanoGPT.
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np

import distprop as dp
from distprop import data, nn, optim
from distprop import functional as F

WIDTH, HEADS, LAYERS = 128, 4, 4


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); x is (B, T, C)."""

    def __init__(self) -> None:
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: dp.Tensor) -> dp.Tensor:
        B, T, C = x.shape
        qkv = F.split(self.attention(self.norm1(x)), C, dim=-1)
        q, k, v = (part.reshape(B, T, HEADS, C // HEADS).transpose(1, 2) for part in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, C/heads)
        x = x + self.projection(mixed.transpose(1, 2).reshape(B, T, C))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class GPT(nn.Module):
    """Token and position embeddings, blocks, and scores (B, characters, T) through the transposed token embedding."""

    def __init__(self, characters: int, context: int) -> None:
        self.token, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(context, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("projection.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if last else 0.02)

    def forward(self, ids: np.ndarray) -> dp.Tensor:
        x = self.token(ids) + self.position(np.arange(ids.shape[1]))
        return F.linear(self.norm(self.blocks(x)), self.token.weight).transpose(1, 2)


def sample(model: GPT, vocabulary: data.CharVocabulary, context: int, length: int) -> str:
    """Continue a line break, character by character."""
    rng, ids = np.random.default_rng(0), vocabulary.encode("\n")
    with dp.no_grad():
        for _ in range(length):
            scores = model(ids[None, -context:]).data[0, :, -1].astype(np.float64) / 0.8
            p = np.exp(scores - scores.max())
            ids = np.append(ids, rng.choice(len(p), p=p / p.sum()))
    return vocabulary.decode(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=Path(os.environ.get("DISTPROP_DATA", "."), "tinyshakespeare/input.txt"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=12, help="windows of the global batch, over all ranks")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--sample", type=int, default=300, help="characters to write at the end")
    parser.add_argument("--run-dir", help="folder for metrics.jsonl")
    args = parser.parse_args()

    if not Path(args.text).is_file():
        parser.error(f"no file {args.text}: give --text FILE, or set DISTPROP_DATA")
    text = Path(args.text).read_text()
    vocabulary = data.CharVocabulary(text)
    ids = vocabulary.encode(text)
    cut = int(0.9 * len(ids))
    train_set = data.RandomWindows(ids[:cut], args.context, length=args.steps * args.batch_size)
    validation = data.TextWindows(ids[cut:], args.context)
    model = GPT(len(vocabulary), args.context)
    warmup = min(100, max(1, args.steps // 10))
    schedule = optim.schedule.warmup(
        optim.schedule.cosine(args.lr, max(1, args.steps - warmup), minimum=args.lr / 10), warmup
    )
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=schedule, betas=(0.9, 0.99))
    trainer = dp.Trainer(
        model, F.cross_entropy, optimizer, batch_size=args.batch_size, clip_norm=1.0, run_dir=args.run_dir
    )
    trainer.fit(train_set, steps=args.steps)
    loss = trainer.evaluate(validation)["loss"]
    if trainer.comm.rank == 0:
        print(f"validation loss {loss:.4f} over {len(validation) * args.context:,} characters")
        print(sample(model, vocabulary, args.context, args.sample))


if __name__ == "__main__":
    main()
