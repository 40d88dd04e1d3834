"""Measure what sample.py's rolling cache costs and what it loses, on a checkpoint and its validation text.

    python tests/text_without_end.py out/python data/python speed    # 100,000 tokens: time and bytes of each tenth
    python tests/text_without_end.py out/python data/python loss     # beside a window that is read anew for each token

The model's context is the budget: what is kept beside the window is taken from it.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import Tokens, load_model  # before torch

import torch
import torch.nn.functional as F

from sample import RollingCache

ROWS, LENGTH, EVERY = 8, 8192, 16  # stretches of text, their length; tokens between two that are predicted anew


def count_bytes(cache) -> int:
    """Count the bytes of all tensors of a cache."""
    parts = [x for value in vars(cache).values() for x in (value if isinstance(value, list) else [value])]
    return sum(x.nbytes for x in parts if isinstance(x, torch.Tensor))


@torch.inference_mode()
def stream(model, ids, kept: dict, block: int = 1, each: int = 0):
    """Read texts (B, T) with a rolling cache -> the loss of each token but the first (B, T-1), nats; each: say how fast."""
    cache = RollingCache(model.config, len(ids), **kept, block=block)
    losses = []
    began = time.process_time()
    for t in range(0, ids.shape[1] - 1, block):
        targets = ids[:, t + 1 : t + 1 + block]
        logits, _ = model(ids[:, t : t + targets.shape[1]], cache=cache)
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none"))
        if each and (t + block) % each == 0:
            speed = each / (time.process_time() - began)
            print(json.dumps({"tokens": t + block, "tokens_per_cpu_s": round(speed), "bytes": count_bytes(cache)}), flush=True)
            began = time.process_time()
    return torch.cat(losses, 1)


@torch.inference_mode()
def read_anew(model, ids, context: int, places):
    """Predict the token after each place from the `context` tokens up to it alone -> losses (B, places)."""
    losses = []
    for t in places:
        logits, _ = model(ids[:, t + 1 - context : t + 1], output="last")
        losses.append(F.cross_entropy(logits[:, 0].float(), ids[:, t + 1], reduction="none"))
    return torch.stack(losses, 1)


def main(folder: str, data: str, what: str, length: int = LENGTH, tokens: int = 100_000):
    torch.set_num_threads(1)
    model = load_model(folder, dtype=torch.float32)
    text = Tokens(data, "val")
    T = model.config.seq_len
    if what == "speed":
        ids = torch.from_numpy(text.read(0, tokens + 1).astype("int64"))
        stream(model, ids[None], {"window": T - 4, "sinks": 4}, block=8, each=tokens // 10)
        return
    starts = [i * (text.n - length - 1) // ROWS for i in range(ROWS)]
    ids = torch.stack([torch.from_numpy(text.read(start, length + 1).astype("int64")) for start in starts])
    places = range(length // 2, length, EVERY)
    anew = read_anew(model, ids, T, places)
    print(json.dumps({"read anew": round(anew.mean().item(), 4)}), flush=True)
    for sinks, summaries in ((0, 0), (1, 0), (4, 0), (4, 16)):
        kept = {"window": T - sinks - summaries, "sinks": sinks, "summaries": summaries}
        losses = stream(model, ids, kept)
        more = (losses[:, list(places)] - anew).mean(1)
        print(json.dumps({**kept, "loss": round(losses[:, length // 2 :].mean().item(), 4), "more": round(more.mean().item(), 4),
                          "standard_error": round(more.std().item() / ROWS**0.5, 4)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
