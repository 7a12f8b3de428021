"""dualbranch: small language models that spend little on easy tokens and much on hard ones.

    from dualbranch import generate, load
    print(generate(load("runs/small"), "Find the value of 18 + 42.", mode="auto").answer)
"""

from dualbranch.checkpoint import LoadedModel, load, load_checkpoint, save_checkpoint
from dualbranch.config import DualBranchConfig, RopeScaling
from dualbranch.generate import Generation, generate, generate_batch
from dualbranch.model import DualBranchModel, ModelOutput
from dualbranch.tokenizer import Tokenizer

__all__ = [
    "DualBranchConfig",
    "DualBranchModel",
    "Generation",
    "LoadedModel",
    "ModelOutput",
    "RopeScaling",
    "Tokenizer",
    "generate",
    "generate_batch",
    "load",
    "load_checkpoint",
    "save_checkpoint",
]
__version__ = "0.1.0"
