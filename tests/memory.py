"""How much memory the tensors of a computation take at most."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within the context, `peak` is the largest number of bytes that tensors made within it have held at one time."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in given and storage._cdata not in self._known:
                self._see(storage)
        return out

    def _see(self, storage):
        place = storage._cdata
        size = storage.nbytes()
        self._known[place] = weakref.finalize(storage, self._release, place, size)
        self.held += size
        self.peak = max(self.peak, self.held)

    def _release(self, place, size):
        self.held -= size
        self._known.pop(place, None)


def _storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
