"""Where the memory opens: gate values over real text (paper section 6.3, figure 7).

Letters: B batch, T tokens, M branches.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engrammar.fusion import Fusion
from engrammar.model.modeling import EngrammarForCausalLM


@contextmanager
def recorded_gates(model: EngrammarForCausalLM) -> Iterator[dict[int, Tensor]]:
    """In this context, each forward pass puts its gates into the dict: {layer: gate_BT, the mean over branches}."""
    seen: dict[int, Tensor] = {}

    def record(layer: int, fusion: Fusion, inputs: tuple[Any, ...]) -> None:
        gate_BTM, _ = fusion.gate(inputs[0], inputs[1])
        seen[layer] = gate_BTM.mean(-1)

    with ExitStack() as stack:
        for layer, block in enumerate(model.model.layers):
            if isinstance(block.fusion, Fusion):
                stack.callback(block.fusion.register_forward_pre_hook(partial(record, layer)).remove)
        yield seen


@torch.no_grad()
def gates_over_text(
    model: EngrammarForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> list[dict[str, Any]]:
    """Runs each text alone and records the gates of every memory layer.

    Returns:
        per text its `tokens`, and their `gates` in 0..1 by layer (mean over branches, rounded), as JSON has them.
    """
    gated = []
    with recorded_gates(model) as seen:
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            model(ids, use_cache=False)
            tokens = [tokenizer.decode([token_id]) for token_id in ids[0].tolist()]
            gates = {str(layer): [round(gate, 4) for gate in seen[layer][0].tolist()] for layer in sorted(seen)}
            gated.append({"tokens": tokens, "gates": gates})
    return gated


def plot_gates(texts: Sequence[Mapping[str, Any]], path: Path | BytesIO) -> None:
    """Draws what `gates_over_text` returns: each text as lines of tokens, shaded by the gate (mean over layers)."""
    lines = [_wrapped(text) for text in texts]
    num_lines = sum(map(len, lines)) + len(lines)
    figure, colours = Figure(figsize=(12, 0.34 * num_lines + 0.9)), colormaps["YlOrRd"]
    axes = figure.subplots()
    y = 0.0
    for text_lines in lines:
        for line in text_lines:
            x = 0.0
            for token, gate in line:
                shown = token.replace("\n", "⏎")
                axes.text(
                    x, -y, shown.replace("$", r"\$"), family="monospace", fontsize=10, va="center",
                    bbox={"facecolor": colours(gate * 0.85), "edgecolor": "none", "pad": 1.5},
                )  # fmt: skip
                x += len(shown)
            y += 1
        y += 0.6
    axes.set_xlim(-0.5, LINE_WIDTH + 2)
    axes.set_ylim(-y + 0.3, 0.9)
    axes.axis("off")
    scale = ScalarMappable(Normalize(0, 1), colours)
    figure.colorbar(scale, ax=axes, orientation="horizontal", fraction=0.04, pad=0.01, aspect=60, label="gate")
    figure.savefig(path, dpi=110, bbox_inches="tight")


LINE_WIDTH = 96  # characters on a line of the heat map


def _wrapped(text: Mapping[str, Any]) -> list[list[tuple[str, float]]]:
    means = [sum(values) / len(values) for values in zip(*text["gates"].values())]
    lines: list[list[tuple[str, float]]] = [[]]
    width = 0
    for token, gate in zip(text["tokens"], means):
        if width + len(token) > LINE_WIDTH:
            lines.append([])
            width = 0
        lines[-1].append((token, gate))
        width += len(token)
    return lines
