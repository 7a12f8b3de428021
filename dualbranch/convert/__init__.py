"""Public checkpoints in: Hugging Face folders and GGUF files become dense `DualBranchModel`s. `families.py` is the door for both."""
