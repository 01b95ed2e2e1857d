"""Engines that serve models with memory: `serve.vllm` is a plug-in of vLLM. The core imports none of this."""
