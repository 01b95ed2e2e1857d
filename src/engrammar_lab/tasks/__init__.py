"""Tasks that tell whether memory helps beyond the loss: facts, reading, needles, tracking, code; their scoring."""
