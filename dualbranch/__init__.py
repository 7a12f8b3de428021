"""dualbranch: small language models that spend little on easy tokens and much on hard ones.

    from dualbranch import generate, load
    print(generate(load("runs/small"), "Find the value of 18 + 42.", mode="auto").answer)
"""

from dualbranch.checkpoint import LoadedModel, load, load_checkpoint, save_checkpoint
from dualbranch.config import DualBranchConfig, RopeScaling
from dualbranch.conversation import Conversation
from dualbranch.generate import Generation, PromptTooLong, generate, generate_batch, stream
from dualbranch.memory import keep_freed_memory
from dualbranch.model import DualBranchModel, ModelOutput
from dualbranch.modes import Mode, resolve
from dualbranch.sampling import SamplingParams
from dualbranch.tokenizer import Tokenizer

__all__ = [
    "Conversation",
    "DualBranchConfig",
    "DualBranchModel",
    "Generation",
    "LoadedModel",
    "Mode",
    "ModelOutput",
    "PromptTooLong",
    "RopeScaling",
    "SamplingParams",
    "Tokenizer",
    "generate",
    "generate_batch",
    "keep_freed_memory",
    "load",
    "load_checkpoint",
    "resolve",
    "save_checkpoint",
    "stream",
]
__version__ = "0.1.0"
