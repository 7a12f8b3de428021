"""Trains a dual-branch model: python train.py configs/small.yaml [--set gate.default_budget=0.2] [--resume]"""

import sys

from dualbranch.distill.main import main

if __name__ == "__main__":
    sys.exit(main())
