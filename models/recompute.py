"""Activation checkpointing: blocks that forget what they computed and compute it again in the backward pass."""

import torch
from torch.utils.checkpoint import checkpoint


def run(block, *inputs):
    """block(*inputs). Where recompute_activations has marked it, only its inputs are kept for the backward pass."""
    if getattr(block, "recompute", False) and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def recompute_activations(network, kinds):
    """Mark all blocks of `network` that are of one of the classes `kinds`."""
    for module in network.modules():
        if isinstance(module, kinds):
            module.recompute = True
