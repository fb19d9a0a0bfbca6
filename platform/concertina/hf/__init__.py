"""Hugging Face in and out: folders of theirs to checkpoints of ours and back, layer by layer, and verified."""
