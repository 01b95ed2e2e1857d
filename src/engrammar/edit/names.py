"""Which ids begin a name: where another name stands after a subject, a question is not about the subject any more.

A name is a word with a capital letter that is none of the common words that begin English sentences. A single letter
counts as one, since names often begin with an id of one letter. In languages that write all nouns so, or none, the rule
closes too early, or never. Letter: V ids of the tokenizer.
"""

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

_COMMON = """about above according after again all almost also although always am among an and another answer any are
around as at be because been before being below beside besides between both but by can could despite did do does done
down during each either even every few finally first for from further had has have he hence her here hers him his how
however if in indeed inside instead into is it its just last later least less like many may maybe me meanwhile might
more moreover most much must my near nearly neither never next no none nor not note nothing now of off often on once one
only or other others our out outside over own perhaps please question rather re same say second see several shall she
should since so some someone something soon still such than thank thanks that the their them then there therefore these
they third this those though through thus to today together too toward two under unless until up upon us very was we
well were what whatever when whenever where whereas wherever whether which while who whoever whom whose why will with
within without would yes yet you your"""
COMMON = frozenset(_COMMON.split())


def begins_name(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Whether each id begins a name, or goes on with one, [V]."""
    special = set(tokenizer.all_special_ids)
    texts = [text.strip() for text in tokenizer.batch_decode([[one] for one in range(len(tokenizer))])]
    named = [text[:1].isupper() and text.lower() not in COMMON for text in texts]
    return np.array([is_named and one not in special for one, is_named in enumerate(named)], dtype=np.bool_)
