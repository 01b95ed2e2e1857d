"""Folders of given tokens, as `prepare` would have written them."""

from pathlib import Path

import numpy as np

from engrammar.train.data import Shard, SplitInfo, TokenSet


def token_set(folder: Path, *, vocab_size: int, **splits) -> TokenSet:
    """A set whose splits (`train`, `validation`) hold these ids."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {}
    for name, ids in splits.items():
        np.asarray(ids, dtype=np.uint16).tofile(folder / f"{name}.bin")
        shard = Shard(file=f"{name}.bin", num_tokens=len(ids), sha256="")
        infos[name] = SplitInfo(num_documents=1, num_tokens=len(ids), num_bytes=len(ids), shards=(shard,))
    return TokenSet(
        path=folder, dtype="uint16", vocab_size=vocab_size, pad_id=0, tokenizer_sha256="", settings={}, splits=infos
    )
