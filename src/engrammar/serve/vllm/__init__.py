"""Our models in vLLM, as a plug-in: vLLM finds `register` by its entry point and calls it in each of its processes.

vLLM's Transformers backend runs the backbone. What it lacks are the ids and the convolution's inputs before each of
the flat tokens of a batch: they lie in vLLM's own KV cache (`state`), so whatever shares, drops or recomputes its
blocks does the same to them. Rows come from our stores (`reading`).
"""

ARCHITECTURE = "EngrammarForCausalLM"


def register() -> None:
    """Tells transformers which config and vLLM which model class belong to our checkpoints."""
    from transformers import AutoConfig, AutoModel
    from vllm import ModelRegistry

    from engrammar.serve.vllm.backbone import ServedConfig, ServedModel

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    AutoModel.register(ServedConfig, ServedModel, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "engrammar.serve.vllm.model:ServedForCausalLM")
