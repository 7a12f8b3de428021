"""Copies a trained checkpoint to where it ships, in half precision: python -m dualbranch.distill.publish runs/NAME/teacher pretrained/NAME"""

from __future__ import annotations

import sys

import torch

from dualbranch.checkpoint import load, save_checkpoint


def main(argv: list[str] | None = None) -> int:
    """`argv`: source and target folder. Weights are stored as float16; what produced them is noted in the manifest."""
    source, target = sys.argv[1:] if argv is None else argv
    found = load(source, dtype=torch.float32)
    save_checkpoint(target, found.model, found.tokenizer, found.extra | {"published_from": str(source)}, dtype="float16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
