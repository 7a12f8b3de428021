"""Sub-commands of `dualbranch`, one module each; `dualbranch/cli.py` lists them."""
