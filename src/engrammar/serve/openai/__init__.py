"""A server of OpenAI's API on transformers' continuous batching: `engrammar serve`."""
