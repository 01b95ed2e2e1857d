"""What evaluation needs: the sums behind its loss, and a loader that reads rows ahead.

Letters: B rows of a batch, T tokens, V ids of the vocabulary.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engrammar.stores.serving import look_ahead

IGNORED = -100  # label of a position that is not scored


class LookingAhead:
    """A loader that reads the rows of the next batch ahead; see `look_ahead`."""

    def __init__(self, model: nn.Module, loader: DataLoader) -> None:
        self.model, self.loader, self.dataset = model, loader, loader.dataset

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return look_ahead(self.model, self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def sum_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """For each row, the sum of the next-token cross entropy in nats, and the number of scored tokens: float64 [B, 2].

    Positions are scored as in transformers' training loss: every label except the first of a row and those that are
    -100. So in packed rows, the labels of the documents' first tokens should be -100.
    """
    targets_BT = labels_BT[:, 1:]
    losses_BT = F.cross_entropy(logits_BTV[:, :-1].mT.float(), targets_BT, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses_BT.double().sum(1), (targets_BT != IGNORED).sum(1).double()], dim=1)
