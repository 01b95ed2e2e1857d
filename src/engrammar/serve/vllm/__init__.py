"""Our models in vLLM, as a plug-in: vLLM finds `register` by its entry point and calls it in each of its processes.

vLLM's Transformers backend runs the backbone. What it lacks are the ids and the convolution's inputs before each of
the flat tokens of a batch: they lie in vLLM's own KV cache (`state`), so whatever shares, drops or recomputes its
blocks does the same to them. Rows come from our stores (`reading`). A model with an attached memory (`attached`) is
served from a folder of links (`serve.folder`).
"""

ARCHITECTURE = "EngrammarForCausalLM"


def register() -> None:
    """Tells transformers which config and vLLM which model class belong to our checkpoints."""
    from transformers import AutoConfig, AutoModel
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from engrammar.serve.folder import DENSE, EXPERTS
    from engrammar.serve.vllm.backbone import ServedConfig, ServedModel
    from engrammar.serve.vllm.choosing import ReadOffer

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    AutoModel.register(ServedConfig, ServedModel, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "engrammar.serve.vllm.model:ServedForCausalLM")
    ModelRegistry.register_model(DENSE, "engrammar.serve.vllm.attached:AttachedForCausalLM")
    ModelRegistry.register_model(EXPERTS, "engrammar.serve.vllm.attached:AttachedMoEForCausalLM")
    for architecture in (ARCHITECTURE, DENSE, EXPERTS):
        MODELS_CONFIG_MAP[architecture] = ReadOffer
