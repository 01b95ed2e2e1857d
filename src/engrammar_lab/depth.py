"""How deep a block works: LogitLens, CKA and the soft alignment index (paper section 6.1, figure 4).

Layer 0 is the embedding, layer l the output of block l, counted from 1. Examples are tokens.
Letters: B batch, T tokens, M branches, D hidden width, n examples, L layers of one model, P of another,
S of both, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from engrammar.model.modeling import EngrammarForCausalLM
from engrammar.train.data import TokenSet

PAPER_K = 5  # number of layers that the paper's soft alignment index averages over


def validation_batches(
    tokens: TokenSet, *, length: int, batch_size: int, num_tokens: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The validation text in order, as evaluation reads it: ids_BT, and real_BT, which is False at padding.

    Args:
        length: tokens of a block; each block begins with the last token of the one before (`train.data.Blocks`).
        num_tokens: about how many tokens to read, in whole blocks; None for all.

    Raises:
        ValueError: the validation text is shorter than a block, or a number is below its minimum.
    """
    blocks = tokens.blocks("validation", length)
    if batch_size < 1 or (num_tokens is not None and num_tokens < 1):
        raise ValueError(f"batch_size is {batch_size} and num_tokens {num_tokens}; allowed: 1 or more.")
    num_blocks = len(blocks) if num_tokens is None else min(len(blocks), -(-num_tokens // length))
    for batch in DataLoader(Subset(blocks, range(num_blocks)), batch_size):  # type: ignore[arg-type]
        yield batch["input_ids"], batch["attention_mask"].bool()


@torch.no_grad()
def layer_streams(model: EngrammarForCausalLM, ids_BT: Tensor) -> list[Tensor]:
    """The residual streams [B, T, M, D] of every layer: the embedding, then after each block (L = blocks + 1)."""
    streams: list[Tensor] = []
    blocks = list(model.model.layers)
    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])).remove)
        for block in blocks:
            stack.callback(block.register_forward_hook(lambda _, __, output: streams.append(output)).remove)
        model.model(ids_BT, use_cache=False)
    return streams


@torch.no_grad()
def logit_lens(
    model: EngrammarForCausalLM,
    tokens: TokenSet,
    *,
    length: int,
    batch_size: int = 8,
    num_tokens: int | None = None,
) -> list[float]:
    """How far the prediction read from each layer is from the final one (paper figure 4a).

    The lens on layer l is lm_head(norm(collapse(streams after block l))), the end of the model itself.

    Returns:
        per layer 0..L the mean over tokens of KL(final || lens), in nats; the last is 0.
    """
    model.eval()
    total_L, count = torch.zeros(model.config.num_hidden_layers + 1, dtype=torch.float64), 0
    for ids_BT, real_BT in validation_batches(tokens, length=length, batch_size=batch_size, num_tokens=num_tokens):
        streams = layer_streams(model, ids_BT.to(model.device))
        real_BT = real_BT.to(model.device)

        def lens(streams_BTMD: Tensor, real_BT: Tensor = real_BT) -> Tensor:
            hidden_BTD = model.model.norm(model.model.collapse(streams_BTMD))
            return model.lm_head(hidden_BTD[real_BT]).float().log_softmax(-1)

        final_nV = lens(streams[-1])
        for layer, streams_BTMD in enumerate(streams):
            kl_n = (final_nV.exp() * (final_nV - lens(streams_BTMD))).sum(-1)
            total_L[layer] += kl_n.sum().double().cpu()
        count += len(final_nV)
    return (total_L / count).tolist()


def centred_gram(hidden_nD: Tensor) -> Tensor:
    """The linear-kernel Gram matrix with a zero diagonal, U-centred: [n, n], float64.

    HSIC_1 of Song et al. (2012, equation 5) is the inner product of two of these over n (n - 3). Each row sums to 0
    with the diagonal 0, which makes the estimate unbiased.

    Raises:
        ValueError: there are under 4 examples.
    """
    n = len(hidden_nD)
    if n < 4:
        raise ValueError(f"The unbiased HSIC was given {n} examples; allowed: 4 or more tokens in a batch.")
    hidden_nD = hidden_nD.double()
    gram_nn = (hidden_nD @ hidden_nD.T).fill_diagonal_(0)
    sum_n = gram_nn.sum(0) / (n - 2)
    return (gram_nn - sum_n - sum_n[:, None] + sum_n.sum() / (n - 1)).fill_diagonal_(0)


def hsic(layers_SnD: list[Tensor]) -> Tensor:
    """Unbiased HSIC of every pair of S layers over the same n examples (Song et al. 2012). Returns hsic_SS, float64."""
    n = len(layers_SnD[0])
    gram_SX = torch.stack([centred_gram(hidden_nD).flatten() for hidden_nD in layers_SnD])
    return gram_SX @ gram_SX.T / (n * (n - 3))


@torch.no_grad()
def cka(
    model: EngrammarForCausalLM,
    other: EngrammarForCausalLM,
    tokens: TokenSet,
    *,
    length: int,
    batch_size: int = 8,
    num_tokens: int | None = None,
) -> list[list[float]]:
    """Similarity of every layer of one model with every layer of another, on the same tokens (paper figure 4b).

    Linear-kernel CKA with the unbiased HSIC, each HSIC averaged over minibatches before the ratio is taken (Nguyen et
    al., arXiv 2010.15327, equation 2), so no activations outlive their batch. The hidden state of a layer is the mean
    of its branches; the examples of a minibatch are its real tokens.

    Returns:
        cka_LP: rows are the layers 0..L of `model`, columns those of `other`. Values are up to 1, and about 0 for
        unrelated layers.

    Raises:
        ValueError: the models have vocabularies of different sizes, or a batch has under 4 tokens.
    """
    if model.config.vocab_size != other.config.vocab_size:
        raise ValueError(
            f"CKA was given models of {model.config.vocab_size} and {other.config.vocab_size} ids; allowed: two models "
            "of one tokenizer."
        )
    num_layers = model.config.num_hidden_layers + 1
    num_both = num_layers + other.config.num_hidden_layers + 1
    hsic_SS = torch.zeros(num_both, num_both, dtype=torch.float64)  # the layers of one model, then of the other
    for ids_BT, real_BT in validation_batches(tokens, length=length, batch_size=batch_size, num_tokens=num_tokens):
        left, right = (_branch_means(each.eval(), ids_BT, real_BT) for each in (model, other))
        hsic_SS += hsic(left + right)  # a sum does as well as a mean: the ratio is the same
    own_S = hsic_SS.diagonal().sqrt()
    return (hsic_SS / own_S / own_S[:, None])[:num_layers, num_layers:].tolist()


def _branch_means(model: EngrammarForCausalLM, ids_BT: Tensor, real_BT: Tensor) -> list[Tensor]:
    """The hidden states [n, D] of every layer at the real tokens."""
    return [streams_BTMD.mean(2).cpu()[real_BT] for streams_BTMD in layer_streams(model, ids_BT.to(model.device))]


def soft_alignment(cka_LP: list[list[float]], k: int | None = None) -> list[float]:
    """Which layer of the other model each layer resembles, as a fractional layer number (paper section 6.1).

    For layer i it is sum_j j s_ij / sum_j s_ij over the k layers j of the other model that are most similar to it. The
    paper's k is 5 of 30 layers. By default k is 5, or all layers if there are fewer; the index then leans to the
    middle, and a smaller k says more. A similarity below 0, which the unbiased estimate allows, has no weight.

    Args:
        cka_LP: what `cka` returns.

    Returns:
        per row of `cka_LP` an index in 0..P-1.

    Raises:
        ValueError: k is out of range, or a layer resembles no layer.
    """
    similarity_LP = torch.tensor(cka_LP, dtype=torch.float64).clamp_min(0)
    num_layers = similarity_LP.shape[1]
    k = min(PAPER_K, num_layers) if k is None else k
    if not 1 <= k <= num_layers:
        raise ValueError(f"k is {k}; allowed: 1 to the {num_layers} layers compared with.")
    weight_Lk, layer_Lk = similarity_LP.topk(k)
    if (weight_Lk[:, 0] == 0).any():
        raise ValueError("soft_alignment was given a layer whose similarities are all 0 or less; it resembles none.")
    return ((weight_Lk * layer_Lk).sum(1) / weight_Lk.sum(1)).tolist()


def compare_depth(
    memory: EngrammarForCausalLM,
    plain: EngrammarForCausalLM,
    tokens: TokenSet,
    *,
    length: int,
    batch_size: int = 8,
    num_tokens: int | None = None,
    k: int | None = None,
) -> dict[str, Any]:
    """All of section 6.1 for one pair of models.

    Returns:
        `logit_lens` (`memory` and `plain`: nats per layer), `cka` (rows: layers of `memory`; columns: of `plain`), and
        `alignment` (`k`; `index` of each layer; `nearest`, the one layer most like it). Layer 0 is the embedding.
    """
    how: dict[str, Any] = {"length": length, "batch_size": batch_size, "num_tokens": num_tokens}
    cka_LP = cka(memory, plain, tokens, **how)
    k = min(PAPER_K, len(cka_LP[0])) if k is None else k
    return {
        "logit_lens": {"memory": logit_lens(memory, tokens, **how), "plain": logit_lens(plain, tokens, **how)},
        "cka": cka_LP,
        "alignment": {
            "k": k,
            "index": soft_alignment(cka_LP, k),
            "nearest": [max(range(len(row)), key=row.__getitem__) for row in cka_LP],
        },
    }
