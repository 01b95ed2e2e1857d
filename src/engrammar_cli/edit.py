"""`engrammar edit ...`: facts into a patch, and what it does. Imports are inside the functions, as in `main.py`."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from engrammar_cli.extras import by_name

Method = Literal["gated", "vector", "rows"]
TOKENS = 4096  # of a text that are read at a time


def learn(
    model: Positional[str],
    facts: Positional[Path],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    out: Path,
    name: str = "facts",
    method: Method = "gated",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    cache: Path = Path("~/.cache/engrammar"),
    no_cache: bool = False,
) -> None:
    """Make a patch that teaches a model facts; weights and files of the model stay as they are.

    Run again after it was killed, the same command goes on where it was: what is learned so far is kept in OUT.parts,
    which is removed at the end.

    Args:
        model: The folder, or the name on the Hub, of a causal language model of transformers or ours.
        facts: CSV, JSON or JSON lines with subject, prompt and object (CounterFact and zsRE are read as they are).
        overrides: Settings of the method to replace, as setting=value (armed=20); docs/edit.md says what they mean.
            gated: probe_depth=0.93 armed=16 strength=1.0 ridge=0.005 match_above=0.1 alike_above=-0.2
            opens_wrongly=0.06 at_most_wrongly=0.2 num_worded=6. vector: depth=0.33 steps=25 stop=0.15 kl=1.0 most=2.0
            num_contexts=2 num_paraphrases=2 num_others=4 seed=0 together=4. rows: by=solve (or gradient) layer=null
            steps=40 stop=0.15 kl=0.5 lr=0.3 most=8.0 ridge=1e-06 rounds=8 num_contexts=2 num_paraphrases=2
            num_others=4 seed=0.
        out: The file of the patch (.safetensors).
        name: What the patch is called in a model.
        method: "gated": the object is written where a probe finds that it is asked. "vector": a value found by gradient
            is added wherever the subject occurs. "rows": rows of the model's hashed table are replaced.
        dtype: The precision in which the model is read; "auto" is that of its files. The patch fits it in any. A
            processor that computes in bf16 slowly is done sooner in float32.
        cache: Folder in which what is read for all facts of a model alike (method gated) is kept for the next time; it
            may be deleted.
        no_cache: Keep nothing there and read it anew. The patch is the same to the bit.
    """
    from engrammar.edit import learn_units, read_facts, request, write_patch
    from engrammar.edit.learning import SETTINGS
    from engrammar.tables.sealed import check_writable
    from engrammar.train.recipe import read_settings

    settings = read_settings(SETTINGS[method], overrides)
    asked = read_facts(facts)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(out.parent)
    parts = out.with_name(out.name + ".parts")
    print(f"{len(asked)} facts; reading how the model words questions")
    keep = None if no_cache else cache.expanduser()
    wanted = request(*_load(model, dtype), asked, method=method, settings=settings, keep=keep)
    patch, refused = learn_units(wanted, name=name, folder=parts)
    write_patch(patch, out)
    shutil.rmtree(parts)
    size = out.stat().st_size
    print(f"{len(patch.facts)} of {len(asked)} facts, {size:,} bytes ({size / len(patch.facts):,.0f} a fact): {out}")
    for one in refused:
        print(f"not written: {one.fact.prompt!r} -> {one.fact.object!r}: {one.reason}")


def _load(model: str, dtype: Any = "auto") -> tuple[Any, Any]:
    """The model, on the accelerator if there is one, and its tokenizer."""
    import torch

    from engrammar.train.attached import load_base
    from engrammar.train.recipe import BaseRecipe

    base, tokenizer = load_base(BaseRecipe(model=model, dtype=dtype))
    return base.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def show(patch: Positional[Path], /, model: str | None = None, text: Path | None = None) -> None:
    """List the facts of a patch with their keys, the facts that share their rows, and what the patch is for.

    Args:
        patch: The file of a patch.
        model: Ask this model each fact in twenty phrasings, and say how many reach the edit, and which do not.
        text: Count how often its keys occur in this text file (needs --model, for its tokenizer).
    """
    from engrammar.edit import apply_patch, reached, read_patch
    from engrammar.edit.facts import as_fact

    if text is not None and model is None:
        raise ValueError("--text needs --model: keys are ids of the model's tokenizer.")
    found = read_patch(patch)
    base, tokenizer = (None, None) if model is None else _load(model)
    words = None if tokenizer is None else _words_of_classes(tokenizer)
    print(f"{_head(found)}; {patch.stat().st_size:,} bytes")
    for line in _facts(found, words):
        print(line)
    if text is not None:
        num_tokens, keys = _uses(found, tokenizer, text)
        print(f"{sum(keys.values()):,} of {num_tokens:,} tokens of {text} end a key")
        for key, count in keys.most_common():
            print(f"    {count:,} times {_shown(key, words)}")
    if base is not None:
        apply_patch(base, found, tokenizer)
        for row in found.facts:
            asked = reached(base, tokenizer, as_fact(row), found)
            print(f"{sum(asked.values())} of {len(asked)} phrasings reach {row['prompt']!r} -> {row['object']!r}")
            for prompt in (prompt for prompt, reaches in asked.items() if not reaches):
                print(f"    not reached: {prompt!r}")


def _head(patch: Any) -> str:
    """Name, base and sizes of a patch."""
    base = patch.base.model
    replaced = sum(len(delta.rows_U) for delta in patch.deltas.values())
    return (
        f"{patch.name}: for a {base['class']} of {base['blocks']} blocks of width {base['hidden_size']}; "
        f"{len(patch.keys_QK):,} keys, {len(patch.values):,} value rows"
        + (f", {replaced:,} rows of hashed tables" if replaced else "")
    )


def _facts(patch: Any, words: dict[int, str] | None) -> Iterator[str]:
    """A line for each fact: its words, its keys, its rows and with how many facts it shares them."""
    from engrammar.edit.patch import value_rows

    owners: dict[int, set[int]] = {}
    rows_of: dict[int, set[int]] = {}
    keys_of: dict[int, dict[tuple[int, ...], None]] = {}
    for entry, fact in enumerate(patch.column("fact").tolist()):
        keys_of.setdefault(fact, {})[patch.key_of(entry)] = None
        for number in value_rows(patch, entry):
            rows_of.setdefault(fact, set()).add(number)
            owners.setdefault(number, set()).add(fact)
    for fact, row in enumerate(patch.facts):
        keys = ", ".join(_shown(key, words) for key in keys_of.get(fact, {}))
        own = rows_of.get(fact, set())
        others = {other for one in own for other in owners[one]} - {fact}
        shared = f"; it shares some with {len(others)} facts" if others else ""
        yield f"{' | '.join(row.values())} | keys {keys or 'none'} | {len(own)} rows{shared}"


def _words_of_classes(tokenizer: Any) -> dict[int, str]:
    """The text of the first id of each class."""
    import numpy as np

    from engrammar.vocabulary import compress_vocabulary

    first = np.unique(compress_vocabulary(tokenizer), return_index=True)
    return {int(one): str(tokenizer.decode([int(index)])) for one, index in zip(*first)}


def _shown(key: tuple[int, ...], words: dict[int, str] | None) -> str:
    """The words of a key; its classes where they are not known."""
    return str(list(key)) if words is None else repr("".join(words[one] for one in key))


def _uses(patch: Any, tokenizer: Any, text: Path) -> tuple[int, Counter[tuple[int, ...]]]:
    """The tokens of a text file, and how often each key of a patch ends at one."""
    from engrammar.edit import uses
    from engrammar.vocabulary import compress_vocabulary

    try:
        read = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {text} ({error}): give a text file in UTF-8.") from error
    ids = tokenizer(read, return_tensors="pt", add_special_tokens=False).input_ids
    back, classes_V = patch.keys_QK.shape[1] - 1, compress_vocabulary(tokenizer)  # a key may begin in the piece before
    firsts = range(TOKENS, ids.shape[1], TOKENS)
    pieces = [ids[:, :TOKENS], *(ids[:, first - back : first + TOKENS] for first in firsts)]
    twice = uses(patch, [ids[:, first - back : first] for first in firsts], classes_V)
    return ids.shape[1], uses(patch, pieces, classes_V).keys - twice.keys


def apply(model: Positional[Path], patch: Positional[Path], /) -> None:
    """Keep a patch in a model's folder; `engrammar generate` applies it from there. Undo takes it back to the bit.

    Args:
        model: The folder of the model.
        patch: The file of a patch.
    """
    from engrammar.edit import apply_patch, keep_patch, kept_files, read_patch

    found = read_patch(patch)
    base, tokenizer = _load(str(model))
    for path in [*kept_files(model), patch]:  # refuses another base, another tokenizer, and conflicts
        apply_patch(base, path, tokenizer)
    keep_patch(found, model)
    print(f"{found.name}: {len(found.facts)} facts are applied in {model}; `engrammar edit undo {model} {found.name}`")


def undo(model: Positional[Path], name: Positional[str], /) -> None:
    """Take a patch back that `engrammar edit apply` keeps in a model's folder.

    Args:
        model: The folder of the model.
        name: The name of the patch.
    """
    from engrammar.edit import drop_patch, kept_names

    drop_patch(model, name)
    print(f"{name} is undone in {model}; applied are: {', '.join(kept_names(model)) or 'none'}")


def forget_(
    where: Positional[Path], subject: Positional[str], /, prompt: str | None = None, model: str | None = None
) -> None:
    """Take the facts about a subject out of a patch, and prove that they are gone: no key, no row, no answer.

    Args:
        where: The file of a patch, or the folder of a model in which patches are applied.
        subject: The subject, as it is written in the fact.
        prompt: Only the fact with this prompt.
        model: The model that is asked; by default the folder, if one is given. A patch of hashed rows needs it.
    """
    from engrammar.edit import forget, kept_files, patches_in, prove_forgotten, read_patch, write_patch

    files = kept_files(where) if where.is_dir() else [where]
    holding = [path for path in files if any(row.get("subject") == subject for row in read_patch(path).facts)]
    if not holding and where.is_dir():
        names = ", ".join(patches_in(where))
        more = f" Of what is in its tables ({names}), undo the patch, forget in its file, apply that." * bool(names)
        raise ValueError(f"No patch that is kept in {where} holds a fact about {subject!r}.{more}")
    asked = str(where) if model is None and where.is_dir() else model
    loaded = None if asked is None else _load(asked)
    for path in holding or files:
        done = forget(read_patch(path), subject, prompt, *(loaded or ()))
        if done.after is None:
            path.unlink()
        else:
            write_patch(done.after, path)
        for fact in done.facts:
            print(f"forgotten: {fact.prompt!r} -> {fact.object!r} ({path})")
        if loaded is None:
            print("give --model to have it asked")
            continue
        proof = prove_forgotten(done, *loaded)
        print(
            f"proof: {proof.keys} of its keys left, {proof.rows} of its rows left, {len(proof.told)} of "
            f"{len(proof.answered)} phrasings answered with it"
        )
        for prompt_asked, (was, now) in proof.answered.items():
            print(f"    {prompt_asked!r} -> {now!r}" + ("" if was == now else f" (without any patch: {was!r})"))


def check(model: Positional[str], patch: Positional[Path], /, max_new_tokens: int = 12) -> None:
    """Ask a model the facts of a patch, without and with it, by greedy decoding.

    Args:
        model: The model that the patch is for.
        patch: The file of a patch.
        max_new_tokens: Tokens of an answer.
    """
    from engrammar.edit import answer, apply_patch, read_patch, says

    found, (base, tokenizer) = read_patch(patch), _load(model)
    prompts = [fact["prompt"] for fact in found.facts]
    before = answer(base, tokenizer, prompts, max_new_tokens)
    apply_patch(base, found, tokenizer)
    after = answer(base, tokenizer, prompts, max_new_tokens)
    right = [says(text, fact["object"]) for fact, text in zip(found.facts, after)]
    for fact, was, now, holds in zip(found.facts, before, after, right):
        print(f"{'yes' if holds else 'NO '}  {fact['prompt']} -> {fact['object']} | was: {was!r} | now: {now!r}")
    print(f"{sum(right)} of {len(right)} facts are answered.")


COMMANDS = by_name(learn, show, check, apply, undo, forget_)
