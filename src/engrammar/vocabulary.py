"""Vocabulary compression (paper section 2.2): token ids that read alike share one class.

Letters: V ids of the tokenizer.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Regex, normalizers
from transformers import PreTrainedTokenizerBase

from engrammar.tables.sealed import written_beside

LONE_SPACE = "\ue000"  # replaces a text that is one space, which Strip would empty
REPLACEMENT = "\ufffd"  # an incomplete UTF-8 sequence decodes to it
CLASSES_FILE = "vocabulary_classes.safetensors"


def _normalizer() -> Any:
    """The normalization that defines a class, in the reference's order.

    It uses Rust normalizers only: a Python rewrite finds another number of classes.
    """
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(LONE_SPACE, " "),
        ]
    )


def compress_vocabulary(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Maps every id of `tokenizer` to its class (paper section 2.2).

    Ids with the same key share a class. The key is the decoded text after normalization (NFKC, NFD, no accents, lower
    case, runs of white space as one space, stripped). If that leaves nothing, it is the text itself; if the text is not
    complete UTF-8, it is the raw token. Classes are numbered in order of first appearance.

    Args:
        tokenizer: any tokenizer that transformers loads, fast or slow, with added tokens.

    Returns:
        classes_V, int64, `len(tokenizer)` long, values 0..num_classes-1 without gaps.

    Raises:
        ValueError: something other than a tokenizer was given.
    """
    require_tokenizer(tokenizer)
    normalizer = _normalizer()
    texts = _decode_each(tokenizer)
    class_of_key: dict[str, int] = {}
    classes_V = np.empty(len(texts), dtype=np.int64)
    for token_id, text in enumerate(texts):
        if REPLACEMENT in text:
            key = tokenizer.convert_ids_to_tokens(token_id)
        else:
            key = normalizer.normalize_str(text) or text
        classes_V[token_id] = class_of_key.setdefault(key, len(class_of_key))
    return classes_V


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a name on the Hub; raises a ValueError if transformers cannot load it."""
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # tokenizers and transformers raise many kinds, with messages of many lines
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{name} holds no tokenizer that can be loaded ({reason}): copy it again, or give another folder or name."
        ) from error


def require_tokenizer(tokenizer: object) -> None:
    """Raises a ValueError if `tokenizer` is a name, a path or another library's tokenizer."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError(
            f"tokenizer is {tokenizer!r:.80}; give a tokenizer of transformers, for instance "
            "AutoTokenizer.from_pretrained(name_or_folder)."
        )


def _decode_each(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each id by itself, special tokens included and spaces unchanged."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    single = [[token_id] for token_id in range(len(tokenizer))]
    if backend is not None:
        return backend.decode_batch(single, skip_special_tokens=False)
    return [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in single]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 of a vocabulary: of every token with its id, added tokens included."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def cached_classes(tokenizer: PreTrainedTokenizerBase, directory: Path) -> NDArray[np.int64]:
    """`compress_vocabulary(tokenizer)`, kept in `directory` (beside the model or the tokenizer) for the next call.

    The file has a fingerprint of the tokenizer and its decoder, and a checksum. If the file is damaged or was made from
    another tokenizer, it is made again: nothing is lost, since the classes follow from the tokenizer.
    """
    path = directory / CLASSES_FILE
    decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    source = hashlib.sha256((fingerprint(tokenizer) + decoder).encode()).hexdigest()
    with contextlib.suppress(SafetensorError, FileNotFoundError), safe_open(path, framework="numpy") as file:
        classes_V, metadata = file.get_tensor("classes"), file.metadata() or {}
        if metadata == {"source_sha256": source, "classes_sha256": _sha256(classes_V)}:
            return classes_V
    classes_V = compress_vocabulary(tokenizer)
    metadata = {"source_sha256": source, "classes_sha256": _sha256(classes_V)}
    with written_beside(path) as partial:
        save_file({"classes": classes_V}, partial, metadata=metadata)
    return classes_V


def _sha256(classes_V: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(classes_V).astype("<i8").tobytes()).hexdigest()
