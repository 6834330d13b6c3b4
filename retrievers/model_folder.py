"""Models on the disk: their folder, a checksum of it, and what may go wrong while it is read."""

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BadKnowledge

# The files of a model's folder that its vectors follow from, and folders with the same weights for other programs.
_DECISIVE = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "modules.json", "sentence_*_config.json"),
    *("config_sentence_transformers.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "*.model"),
)
_OTHER_FORMATS = ("onnx", "openvino")


def model_folder(name_or_path: str | Path, what: str) -> Path:
    """The folder of this name, or that into which the hub's model of this name was fetched (safetensors only)."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        if isinstance(name_or_path, Path) or folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path):
            raise BadKnowledge(f"{what}: there is no such folder")
        from huggingface_hub import snapshot_download

        hub_id = name_or_path if "/" in name_or_path else f"sentence-transformers/{name_or_path}"
        wanted = [pattern for name in _DECISIVE for pattern in (name, f"*/{name}")]
        with reading(what, f"there is no such folder, and the hub's {hub_id} cannot be fetched"):
            others = [f"{other}/*" for other in _OTHER_FORMATS]
            folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=others))
    for pickled in sorted(folder.rglob("pytorch_model*.bin")):
        if not any(pickled.parent.glob("*.safetensors")) and pickled.relative_to(folder).parts[0] not in _OTHER_FORMATS:
            raise BadKnowledge(
                f"{what}: cannot be loaded ({pickled} is pickled, which can run code when read); "
                "save the model again as safetensors (save_pretrained does)"
            )
    # Without these transformers makes up a tokenizer that knows five words.
    if not any(any(folder.rglob(name)) for name in ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")):
        raise BadKnowledge(f"{what}: cannot be loaded ({folder} holds neither tokenizer.json nor a vocabulary)")
    return folder


def fingerprint(folder: Path) -> str:
    """sha256, in hex, over the names and contents of the files that a model's vectors follow from."""
    total = hashlib.sha256()
    try:
        for path in sorted(folder.rglob("*")):
            place = path.relative_to(folder)
            if place.parts[0] not in _OTHER_FORMATS and any(fnmatch.fnmatch(path.name, name) for name in _DECISIVE):
                with path.open("rb") as file:
                    total.update(f"{place.as_posix()}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
        raise BadKnowledge(f"{folder}: cannot be read ({error})") from error
    return total.hexdigest()


@contextmanager
def reading(what: str, trouble: str = "cannot be loaded") -> Iterator[None]:
    """No progress bar from transformers while this is open, and whatever a damaged file raises is a `BadKnowledge`."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise BadKnowledge(f"{what}: {trouble} ({type(error).__name__}: {reason})") from error
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
