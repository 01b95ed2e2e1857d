"""Changing facts of a model that exists: patches beside the other ways to do so, on the same facts."""
