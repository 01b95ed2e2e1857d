"""The command line: `main.py` holds the commands; `table`, `lab` and `eval` have files of their own."""
