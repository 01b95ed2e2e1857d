"""A codebook beside one MLP: GRACE (arXiv 2211.11031). No weight is changed.

Letters: E entries, D hidden width, N texts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from engrammar.attach.blocks import evaluating, host_of
from engrammar.edit import Fact
from engrammar.edit.optimizing import Text
from engrammar_lab.editing.covariances import run_to
from engrammar_lab.editing.edited import Edited, Model
from engrammar_lab.editing.values import ValueSettings, at_the_end, find_values
from engrammar_lab.editing.weights import mlp_of

ALONE = ValueSettings(kl=0.0, decay=0.0, num_prefixes=0)


@dataclass(frozen=True, kw_only=True)
class CodebookSettings:
    """GRACE."""

    block: int  # whose MLP the codebook stands beside
    radius: float  # epsilon of a new entry, a Euclidean distance of what the MLP reads
    values: ValueSettings = ALONE  # by gradient, from what the MLP gives, without decay or other texts


@final
class Codebook:
    """Keys with a radius, a value and a label each: what the entry says."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.keys_ED = torch.zeros(0, width, device=device)
        self.values_ED = torch.zeros(0, width, device=device)
        self.radius_E = torch.zeros(0, device=device)
        self.labels: list[str] = []

    def learn(self, key_D: Tensor, value_D: Tensor, label: str, radius: float) -> None:
        """The paper's algorithm 1 (section 3.2): a new entry; or the nearest one is widened, where it says the same; or
        it is narrowed to half of the distance, and the new one is as narrow."""
        if len(self.labels):
            distance_E = (self.keys_ED - key_D).norm(dim=1)
            nearest = int(distance_E.argmin())
            distance = float(distance_E[nearest])
            if distance <= float(self.radius_E[nearest]) + radius:
                if self.labels[nearest] == label:
                    self.radius_E[nearest] = max(float(self.radius_E[nearest]), distance * (1 + 1e-3) + 1e-6)
                    return
                self.radius_E[nearest] = radius = distance / 2
        self.keys_ED = torch.cat([self.keys_ED, key_D[None]])
        self.values_ED = torch.cat([self.values_ED, value_D[None]])
        self.radius_E = torch.cat([self.radius_E, self.radius_E.new_tensor([radius])])
        self.labels.append(label)

    def replace(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The value of the nearest key in place of what the MLP gives, at each token that is inside its radius (eq. 1;
        deferral: everywhere else the MLP's own)."""
        if not self.labels:
            return output
        distance, nearest = torch.cdist(args[0].float(), self.keys_ED[None].expand(len(args[0]), -1, -1)).min(-1)
        inside = distance < self.radius_E[nearest]
        return torch.where(inside[..., None], self.values_ED[nearest].to(output), output)

    @property
    def num_bytes(self) -> int:
        """Of keys, values and radii; labels are needed to learn more, not to answer."""
        return sum(one.numel() * one.element_size() for one in (self.keys_ED, self.values_ED, self.radius_E))


def codebook(model: Model, tokenizer: Any, facts: Sequence[Fact], seed: int, settings: CodebookSettings) -> Edited:
    """GRACE at one MLP, whose input is the key and whose output is replaced by the value.

    A fact's key is read at its prompt's last token; its value is optimized there for the whole object, which is read
    after it. The paper looks up the last token of a prompt; here each token is looked up by itself, so that a prompt
    is answered alike alone, in a batch, from a cache and with an answer after it. In cached decoding the tokens of the
    answer find what the prompt's last token left in the cache, and are looked up too. Values are found in the model
    without the codebook, many at a time; the paper finds one after another.
    """
    mlp = mlp_of(model, settings.block)
    texts = {fact: at_the_end(tokenizer, fact) for fact in facts}
    kept = [fact for fact in facts if texts[fact]]
    keys, outputs = _read(model, mlp, [texts[fact][0] for fact in kept], settings.block)
    values = outputs + find_values(model, [texts[fact] for fact in kept], settings.block, settings.values)
    made = Codebook(keys.shape[1], keys.device)
    for fact, key_D, value_D in zip(kept, keys, values):
        made.learn(key_D, value_D, fact.object.strip(), settings.radius)
    handle = mlp.register_forward_hook(made.replace)
    return Edited(
        undo=handle.remove, num_bytes=made.num_bytes, refused=tuple(fact for fact in facts if not texts[fact])
    )


@torch.no_grad()
def _read(model: Model, mlp: nn.Module, texts: Sequence[Text], block: int) -> tuple[Tensor, Tensor]:
    """What an MLP reads and gives where each text is written, [N, D] both."""
    read: list[tuple[Tensor, Tensor]] = []
    device = next(host_of(model).parameters()).device
    take = mlp.register_forward_hook(lambda _, args, out: read.append((args[0][0, -1].float(), out[0, -1].float())))
    with evaluating(host_of(model)), take:
        for text in texts:
            run_to(model, torch.tensor([text.ids[: text.written[0] + 1]], device=device), block)
    keys, outputs = zip(*read)
    return torch.stack(keys), torch.stack(outputs)
