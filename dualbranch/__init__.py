"""dualbranch: small language models that spend little on easy tokens and much on hard ones."""

from dualbranch.config import DualBranchConfig, RopeScaling
from dualbranch.model import DualBranchModel, ModelOutput

__all__ = ["DualBranchConfig", "DualBranchModel", "ModelOutput", "RopeScaling"]
__version__ = "0.1.0"
