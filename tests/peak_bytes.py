"""How many bytes of tensors live at once, and which products are taken, as torch dispatches."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "matmul")


class PeakBytes(TorchDispatchMode):
    """The most bytes of new tensors that lived at one time, and how often each operator ran.

    Scratch memory inside an operator is not seen; tensors made before the context do not count.
    """

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.calls: Counter[str] = Counter()
        self._known: set[int] = set()
        self._ignore(inputs)

    @property
    def products(self) -> int:
        """Matrix products taken."""
        return sum(self.calls[name] for name in PRODUCTS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._ignore(leaf for leaf in tree_leaves((args, kwargs)) if _is_plain(leaf))
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for leaf in tree_leaves(result):
            if _is_plain(leaf):
                self._count(leaf.untyped_storage())
        return result

    def _ignore(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                # What is made at the same address later on counts.
                weakref.finalize(storage, self._known.discard, storage._cdata)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type != "meta"
