# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Tiny GPT-2, OPT and LLaMA models with random weights and real byte-level tokenizers, made in a folder of one's own.

Weights are drawn wide, so that greedy output wanders instead of repeating one token.
"""

from pathlib import Path
from typing import Any

VOCABULARY = 384
CONTEXT = 512
TEXT = (
    "The quick brown fox jumps over the lazy dog while the other dogs of the town are sleeping in the sun. "
    "Speculative retrieval guesses a document from a small cache and verifies the guess against the knowledge base; "
    "a wrong guess is corrected, so that the answer is the same as before. Who wrote the first book about the river?"
)
SPECIAL = {  # beginning, end, padding
    "gpt2": ("<|endoftext|>", "<|endoftext|>", None),
    "opt": ("</s>", "</s>", "<pad>"),
    "llama": ("<s>", "</s>", None),
}
SPECIAL["mistral"] = SPECIAL["qwen2"] = SPECIAL["llama"]


def tiny_model(family: str, folder: Path, **settings: Any) -> Path:
    """Make the model in `folder / family`, or find it there; `settings` override the configuration of a new one.

    Sets PyTorch to one thread: products this small only get slower by being shared out.
    """
    import torch

    torch.set_num_threads(1)
    path = folder / family
    if not (path / "model.safetensors").exists():
        path.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer(family)
        tokenizer.save_pretrained(path)
        make_network(family, tokenizer, settings).save_pretrained(path)
    return path


def make_tokenizer(family: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end, pad = SPECIAL[family]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(dict.fromkeys(filter(None, (begin, pad, end)))),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    if family != "gpt2":
        ids = [(begin, backend.token_to_id(begin))]
        backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end, pad_token=pad)


def make_network(family: str, tokenizer: Any, settings: dict[str, Any]) -> Any:
    import torch
    import transformers

    shared = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    llama = {"intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.3}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"initializer_range": 0.3}),
        "opt": (
            transformers.OPTConfig,
            transformers.OPTForCausalLM,
            {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.3},
        ),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, llama),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {**llama, "sliding_window": None}),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, llama),
    }
    config_class, network_class, shape = kinds[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(family.encode()))
        return network_class(config_class(**{**shared, **shape, **settings})).eval()
