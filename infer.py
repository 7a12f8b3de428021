"""Talk to a trained model: `python infer.py --mode auto --prompt "What is 12 + 30?"`. Everything is in `dualbranch/infer.py`."""

import sys

from dualbranch.infer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
