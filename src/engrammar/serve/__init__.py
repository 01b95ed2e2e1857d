"""Engines that serve models with memory: our own server, and a plug-in of vLLM. The core imports none of this."""
