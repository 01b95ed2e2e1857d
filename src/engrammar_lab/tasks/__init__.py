"""Tasks that show whether memory helps beyond the loss (facts, reading, needles, tracking, code), and their scoring."""
