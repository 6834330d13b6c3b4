"""Trains the demo's language model from nothing: LLaMA-shaped, 7.2 million parameters, on Wikipedia text, in set time.

    python examples/train_lm.py --data FOLDER --out FOLDER --minutes 70

Any other model serves the library as well; this one exists so that the demo has a real model that is small enough for
a repository, and whose origin is known to the last word.
"""

import gzip
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 8_192
CONTEXT = 512
BATCH = 6
PEAK_RATE = 3e-3
WARM_UP = 200  # steps
PIECE = 200_000  # characters of running text that are tokenised together
HELD_OUT = 30_000  # tokens that the perplexity is taken over


def articles(data: Path) -> list[str]:
    """The training text: articles put together from their passages, then running text in large pieces."""
    passages: dict[str, list[str]] = {}
    with gzip.open(data / "passages_wikipedia.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            passage = json.loads(line)
            passages.setdefault(passage["title"], []).append(passage["text"])
    with gzip.open(data / "wikipedia_lm_train.txt.gz", "rt", encoding="utf-8") as file:
        running = file.read()
    whole = [f"{title}\n{' '.join(texts)}" for title, texts in passages.items()]
    return whole + [running[start : start + PIECE] for start in range(0, len(running), PIECE)]


def learn_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, learned from every fourth text; any string can be encoded, and `END` is token 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts[::4],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return bpe


def new_model() -> Any:
    """Six layers of 256 with random weights; input and output embeddings are one matrix."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2_048,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=True,
        )
    )


def batches(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Windows of `CONTEXT` tokens from places drawn with a fixed seed, without end; int64 [BATCH, CONTEXT]."""
    draw = np.random.default_rng(0)
    while True:
        starts = draw.integers(0, len(tokens) - CONTEXT, BATCH)
        yield torch.stack([tokens[start : start + CONTEXT] for start in starts])


def train(model: Any, tokens: torch.Tensor, seconds: float) -> None:
    """AdamW under a rate that warms up and then falls along a cosine to a twentieth, measured by the clock."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start = time.monotonic()
    for step, batch in enumerate(batches(tokens)):
        spent = time.monotonic() - start
        if spent >= seconds:
            return
        fall = 0.05 + 0.475 * (1 + math.cos(math.pi * spent / seconds))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, step / WARM_UP) * fall
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19:
            speed = (step + 1) * BATCH * CONTEXT / (time.monotonic() - start)
            print(f"step {step + 1:,}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """exp of the mean loss per token over whole windows of `CONTEXT`; nothing is remembered across windows."""
    starts = range(0, len(tokens) - CONTEXT + 1, CONTEXT)
    windows = (tokens[None, start : start + CONTEXT] for start in starts)
    losses = [model(window, labels=window).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def main(
    data: Annotated[Path, typer.Option(envvar="RALMSPEC_DATA", exists=True, help="Folder with the full data.")],
    out: Annotated[Path, typer.Option(help="Folder for tokenizer and weights.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for training alone.")] = 70.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch may use.")] = 1,
) -> None:
    """Learn a tokenizer, train, write bfloat16 safetensors, and say the perplexity on held-out text."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    texts = articles(data)
    bpe = learn_tokenizer(texts)
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END).save_pretrained(out)
    encoded = bpe.encode_batch_fast(texts)
    tokens = torch.from_numpy(np.concatenate([np.array([0, *text.ids]) for text in encoded]))
    print(f"{len(tokens):,} tokens of {len(texts):,} texts", flush=True)

    model = new_model()
    train(model, tokens, minutes * 60)
    model.to(torch.bfloat16).save_pretrained(out)

    with gzip.open(data / "wikipedia_lm_valid.txt.gz", "rt", encoding="utf-8") as file:
        held_out = torch.tensor(bpe.encode(file.read()).ids[:HELD_OUT])
    print(f"perplexity {perplexity(model.float().eval(), held_out):.1f} on held-out text; written to {out}")


if __name__ == "__main__":
    typer.run(main)
