"""`engrammar edit ...`: facts into a patch, and what it does. Imports are inside the functions, as in `main.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

Method = Literal["gated", "vector", "rows"]


def learn(
    model: Positional[str], facts: Positional[Path], /, out: Path, name: str = "facts", method: Method = "gated"
) -> None:
    """Make a patch that teaches a model facts; weights and files of the model stay as they are.

    Args:
        model: The folder, or the name on the Hub, of a causal language model of transformers or ours.
        facts: CSV, JSON or JSON lines with subject, prompt and object (CounterFact and zsRE are read as they are).
        out: The file of the patch (.safetensors).
        name: What the patch is called in a model.
        method: "gated": the object is written where a probe finds that it is asked. "vector": a value found by gradient
            is added wherever the subject occurs. "rows": rows of the model's hashed table are replaced.
    """
    from engrammar.edit import learn as learn_facts
    from engrammar.edit import read_facts, write_patch
    from engrammar.train.attached import load_base
    from engrammar.train.recipe import BaseRecipe

    asked = read_facts(facts)
    patch, refused = learn_facts(*load_base(BaseRecipe(model=model)), asked, name=name, method=method)
    write_patch(patch, out)
    size = out.stat().st_size
    print(f"{len(patch.facts)} of {len(asked)} facts, {size:,} bytes ({size / len(patch.facts):,.0f} a fact): {out}")
    for one in refused:
        print(f"not written: {one.fact.prompt!r} -> {one.fact.object!r}: {one.reason}")


def show(patch: Positional[Path], /) -> None:
    """List the facts of a patch, and what it is for.

    Args:
        patch: The file of a patch.
    """
    from engrammar.edit import read_patch

    found = read_patch(patch)
    base = found.base.model
    print(
        f"{found.name}: for a {base['class']} of {base['blocks']} blocks of width {base['hidden_size']}; "
        f"{len(found.keys_QK):,} keys, {len(found.values):,} value rows, {patch.stat().st_size:,} bytes"
    )
    for fact in found.facts:
        print(" | ".join(fact.values()))


def check(model: Positional[str], patch: Positional[Path], /, max_new_tokens: int = 12) -> None:
    """Ask a model the facts of a patch, without and with it, by greedy decoding.

    Args:
        model: The model that the patch is for.
        patch: The file of a patch.
        max_new_tokens: Tokens of an answer.
    """
    from engrammar.edit import apply_patch, read_patch
    from engrammar.train.attached import load_base
    from engrammar.train.recipe import BaseRecipe
    from engrammar.train.sample import Sampling, complete

    found, (base, tokenizer) = read_patch(patch), load_base(BaseRecipe(model=model))
    greedy = Sampling(temperature=0, max_new_tokens=max_new_tokens)

    def answers() -> list[str]:
        return [complete(base.eval(), tokenizer, f["prompt"], greedy)[len(f["prompt"]) :] for f in found.facts]

    before = answers()
    apply_patch(base, found, tokenizer)
    after = answers()
    right = [text.strip().startswith(fact["object"]) for fact, text in zip(found.facts, after)]
    for fact, was, now, holds in zip(found.facts, before, after, right):
        print(f"{'yes' if holds else 'NO '}  {fact['prompt']} -> {fact['object']} | was: {was!r} | now: {now!r}")
    print(f"{sum(right)} of {len(right)} facts are answered.")


COMMANDS: dict[str, Callable[..., None]] = {"learn": learn, "show": show, "check": check}
