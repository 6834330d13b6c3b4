"""Reads a language model from a folder or the Hugging Face hub, and refuses what cannot be served as promised."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ralmspec.retrievers import model_folder
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra

from . import packed_attention
from .errors import BadModel
from .feed_forward import FeedForwardInput
from .kv_slots import KvLayout
from .tokenizer import PlainTokenizer, token_set

FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2")
"""`model_type`s whose prefix reuse the tests hold against recomputation; the last two are LLaMA's shape."""

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in memory, ready to decode, and what its files say about it; `source` is its folder or hub id."""

    source: str
    network: Any
    feed_forward_input: FeedForwardInput
    tokenizer: PlainTokenizer
    kv_layout: KvLayout
    context_length: int
    end_tokens: frozenset[int]
    start_tokens: tuple[int, ...]


def read(path_or_hub_id: str | os.PathLike[str], *, device: str, dtype: str) -> Checkpoint:
    """Load and check. Raises `BadModel`, `MissingExtra`, and `ValueError` for a device or dtype that is not there."""
    try:
        import torch
        import transformers
    except ImportError:
        raise MissingExtra("a local language model needs: pip install 'ralmspec[local]'") from None
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not _is_there(device):
        raise ValueError(f"device {device!r} is not there: PyTorch {torch.__version__} here does not see it; use 'cpu'")
    where = _folder_or_hub_id(path_or_hub_id)
    packed_attention.register()
    safe: dict[str, Any] = {"trust_remote_code": False}
    with _quiet(), _reading(where, "config.json"):
        config = transformers.AutoConfig.from_pretrained(where, **safe)
    _check_family(where, config)
    with _quiet(), _reading(where, "the weights"):
        reader: Any = transformers.AutoModelForCausalLM
        network, report = reader.from_pretrained(
            where,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=packed_attention.NAME,
            use_safetensors=True,
            output_loading_info=True,
            **safe,
        )
    if missing := sorted(report["missing_keys"]):
        raise BadModel(
            f"{where}: the weights lack {len(missing)} of the model's tensors, {missing[0]!r} among them; "
            "they belong to another configuration or were cut short: fetch them again"
        )
    with _quiet(), _reading(where, "the tokenizer"):
        fast = transformers.AutoTokenizer.from_pretrained(where, **safe)
        end_tokens = token_set(network.generation_config.eos_token_id, config.eos_token_id)
        # An end that is an ordinary word (a line feed, say) stays one: dropping it would change the text.
        special = {*fast.all_special_ids, *(end_tokens & set(fast.get_added_vocab().values()))}
        tokenizer = PlainTokenizer(fast.backend_tokenizer, special)
        start_tokens = tokenizer.start_tokens()
    if not 0 < tokenizer.largest_id < config.vocab_size:
        raise BadModel(
            f"{where}: the tokenizer's largest token id is {tokenizer.largest_id}, the model knows "
            f"{config.vocab_size} tokens; tokenizer.json is missing or belongs to another model"
        )
    network = network.eval().requires_grad_(False).to(device)
    if torch.device(device).type == "cpu" and dtype in ("float32", "float64"):
        _lay_out_for_decoding(network)
    context_length = int(config.max_position_embeddings)
    return Checkpoint(
        source=where,
        network=network,
        feed_forward_input=FeedForwardInput(network),
        tokenizer=tokenizer,
        kv_layout=_kv_layout(network),
        context_length=context_length,
        end_tokens=end_tokens,
        start_tokens=start_tokens,
    )


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256, in hex, of the weights' and the tokenizer's files as they are now; the same in every dtype and device.

    Raises `BadModel` where they cannot be read any more.
    """
    folder = Path(checkpoint.source)
    try:
        if not folder.is_dir():
            from transformers.utils.hub import cached_file

            revision = getattr(checkpoint.network.config, "_commit_hash", None)
            with _reading(checkpoint.source, "config.json"):
                found = cached_file(checkpoint.source, "config.json", _commit_hash=revision)
            folder = Path(str(found)).parent
        return model_folder.fingerprint(folder)
    except BadKnowledge as error:
        raise BadModel(str(error)) from error


def _folder_or_hub_id(path_or_hub_id: str | os.PathLike[str]) -> str:
    name = os.fspath(path_or_hub_id)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadModel(f"{folder} holds no config.json: give the folder that transformers' save_pretrained wrote")
        if not list(folder.glob("*.safetensors")):
            pickled = [
                file.name for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".pt", ".pth", ".ckpt")
            ]
            found = f"only pickled weights ({pickled[0]}), which can run code when loaded" if pickled else "no weights"
            raise BadModel(
                f"{folder} holds {found}: save the model as safetensors (save_pretrained does) and load that"
            )
        return str(folder)
    if isinstance(path_or_hub_id, Path) or folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise BadModel(f"{name!r} is no model folder: check the path, or give a hub id such as 'facebook/opt-125m'")
    return name


def _check_family(where: str, config: Any) -> None:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if config.model_type not in FAMILIES or config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise BadModel(f"{where} is a {config.model_type!r} model; served are decoders of {', '.join(FAMILIES)}")
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer}
    if kinds:
        raise BadModel(
            f"{where} keeps only part of its past ({', '.join(sorted(kind.__name__ for kind in kinds))}), so it cannot "
            "go back to an earlier prefix as a rollback must; choose a model without sliding-window attention"
        )


def _kv_layout(network: Any) -> KvLayout:
    config = network.config
    heads = config.num_attention_heads
    return KvLayout(
        layers=config.num_hidden_layers,
        heads=getattr(config, "num_key_value_heads", None) or heads,
        dimension=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=network.dtype,
        device=network.device,
    )


def _lay_out_for_decoding(network: Any) -> None:
    """Store the weights of widening layers input by input: the same numbers, read faster by one-token passes.

    The product of a matrix and one vector runs up to three times as fast this way where MKL meets an AMD processor;
    prefill does not change. An output layer that shared its weights with the embedding gets a copy of its own.
    """
    import torch

    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear) and layer.out_features >= layer.in_features:
            weight = layer.weight.detach().t().contiguous().t()
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)


def _is_there(device: str) -> bool:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # how PyTorch says it depends on the back end
        return False
    return True


@contextmanager
def _reading(where: str, what: str) -> Iterator[None]:
    """Whatever a damaged file makes the readers raise is a `BadModel` that names it."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise BadModel(
            f"{where}: {what} cannot be read ({type(error).__name__}: {reason}); "
            "fetch the files again, or check the name if this is a hub id"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars from transformers while this is open."""
    import transformers

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
