"""The paper's model on transformers' modules: its config, the model, presets, and the counting of parameters.

Public: what `__all__` names. The modules hold one idea each: `configuration`, `presets`, `hyper` (branches), `block`,
`saving`, `modeling`, `budget`.
"""

from engrammar.model.budget import Counts, count_parameters, solve_budget
from engrammar.model.configuration import EngrammarConfig, load_config
from engrammar.model.modeling import EngrammarForCausalLM, EngrammarModel
from engrammar.model.presets import preset

__all__ = [
    "Counts",
    "EngrammarConfig",
    "EngrammarForCausalLM",
    "EngrammarModel",
    "count_parameters",
    "load_config",
    "preset",
    "solve_budget",
]
