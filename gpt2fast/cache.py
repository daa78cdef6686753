"""The key-value cache. Its memory is allocated in advance.

Keys and values of a layer are stored as (B, H, S, D) and returned as views (B, S, H, D). Each row of the batch has its
own first and last column.
"""

import torch
from torch import Tensor

from .dtypes import dtype_name

MOST_DECODED = 8  # up to this number of new tokens, decode_attention runs; its kernels are made for that many


class Cache:
    """The keys and values of the tokens so far, for every layer.

    ``length`` is the number of filled columns in the longest row, and ``lengths`` (B,) int64 is that of each row. The
    first ``starts[b]`` columns of row b are left padding. A mask that hides other columns is kept as ``mask`` (B, S)
    bool. Where the ``capacity`` S does not suffice, it is doubled, up to ``limit``.

    A ``fixed`` cache is for CUDA graphs. Its tensors keep their addresses and are changed in place. It finds the
    current columns by ``lengths`` and counts nothing on the host, so that ``length`` stays as it is.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_size: int,
        *,
        capacity: int = 64,
        limit: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        sizes = dict(layers=layers, heads=heads, head_size=head_size, capacity=capacity)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"gpt2fast.Cache: {name} must be at least 1, got {size}")
        self.limit = limit
        self.length = 0
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.starts: Tensor | None = None
        self.mask: Tensor | None = None
        self.fixed = False
        self._fixed: tuple[Tensor, Tensor] | None = None  # lengths and starts of a fixed cache
        self._rows: Tensor | None = None
        self._columns: Tensor | None = None
        shape = (batch, heads, min(capacity, limit or capacity), head_size)
        self._memory = [torch.empty(2, *shape, dtype=dtype, device=device) for _ in range(layers)]
        self._view()

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        return self._memory[0].shape[3]

    def check(self, layers: int, batch: int, heads: int, head_size: int, dtype: torch.dtype | None) -> None:
        """Raises ValueError where a model of those sizes cannot use the cache, TypeError for its dtype (None: any)."""
        found = dict(zip(("batch", "heads", "head_size"), (self.batch, *self._memory[0].shape[2::2])))
        found = dict(layers=len(self._memory)) | found
        for name, expected in dict(layers=layers, batch=batch, heads=heads, head_size=head_size).items():
            if found[name] != expected:
                raise ValueError(f"gpt2fast.Cache: {name} must be {expected}, got {found[name]}")
        if dtype is not None and self._memory[0].dtype != dtype:
            words = [dtype_name(d) for d in (dtype, self._memory[0].dtype)]
            raise TypeError(f"gpt2fast.Cache: dtype must be {words[0]}, got {words[1]}")

    def _view(self) -> None:
        views = [memory.transpose(2, 3) for memory in self._memory]
        self.keys = [view[0] for view in views]
        self.values = [view[1] for view in views]

    def reserve(self, capacity: int) -> None:
        """Makes room for ``capacity`` columns and keeps the content. Raises ValueError beyond ``limit``."""
        if capacity <= self.capacity:
            return
        if self.limit is not None and capacity > self.limit:
            raise ValueError(f"gpt2fast.Cache: at most {self.limit} columns fit (n_positions), got {capacity}")
        grown = max(capacity, 2 * self.capacity)
        grown = grown if self.limit is None else min(grown, self.limit)
        for layer, old in enumerate(self._memory):
            new = old.new_empty(*old.shape[:3], grown, old.shape[4])
            new[:, :, :, : self.length] = old[:, :, :, : self.length]
            self._memory[layer] = new
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, grown - self.mask.shape[1]), value=True)
        self._view()

    def advance(self, tokens: int, mask: Tensor | None = None) -> None:
        """Adds ``tokens`` new columns, which ``append`` then fills in every layer.

        mask (B, tokens) bool: False for padding. Left padding in the first columns is stored in ``starts``.
        """
        if self.fixed:
            if mask is not None:
                raise ValueError(f"gpt2fast.Cache: mask must be None in a fixed cache, got one of {tuple(mask.shape)}")
            self._rows = torch.arange(self.batch, device=self.lengths.device)[:, None]
            self._columns = self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)
            self.lengths += tokens
            return
        before = self.length
        self.reserve(before + tokens)
        self.length = before + tokens
        self.lengths = self.lengths + tokens
        if mask is not None:
            self._hide(mask, before)

    def visible(self) -> Tensor | None:
        """(B, length) bool: the columns that are not padding, or None where there is no padding."""
        if self.mask is not None:
            return self.mask[:, : self.length]
        if self.starts is None or self.fixed:  # decode_attention uses starts
            return None
        return torch.arange(self.length, device=self.starts.device) >= self.starts[:, None]

    def _hide(self, mask: Tensor, before: int) -> None:
        left_padded = before == 0 and bool((mask[:, 1:] >= mask[:, :-1]).all())
        if left_padded:
            self.starts = mask.shape[1] - mask.sum(1)
            return
        if self.mask is None:
            self.mask = torch.ones(self.batch, self.capacity, dtype=torch.bool, device=mask.device)
            if self.starts is not None:
                self.mask &= torch.arange(self.capacity, device=mask.device) >= self.starts[:, None]
            self.starts = None
        self.mask[:, before : self.length] = mask

    def decodes(self, tokens: int) -> bool:
        """Whether decode_attention runs. It takes few new tokens, and in each row one range of keys without gaps."""
        return self.fixed or (self.mask is None and tokens <= MOST_DECODED)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, T, H, D) into the current columns.

        Returns the layer's keys and values, (B, S, H, D): all columns for decode_attention, the filled ones otherwise.
        """
        keys, values = self.keys[layer], self.values[layer]
        if not self.fixed:
            first, count = self.length - k.shape[1], k.shape[1]
            keys.narrow(1, first, count).copy_(k)
            values.narrow(1, first, count).copy_(v)
        else:
            keys[self._rows, self._columns] = k
            values[self._rows, self._columns] = v
        if self.decodes(k.shape[1]):
            return keys, values
        return keys[:, : self.length], values[:, : self.length]

    def select(self, rows: Tensor) -> None:
        """Leaves only these rows (N,) int64 of the batch, in this order and in new memory.

        Raises ValueError for a fixed cache, whose tensors must keep their addresses.
        """
        if self.fixed:
            raise ValueError("gpt2fast.Cache: select must not be called on a fixed cache: clear it first")
        for layer, old in enumerate(self._memory):
            new = old.new_empty(2, len(rows), *old.shape[2:])
            new[:, :, :, : self.length] = old[:, rows, :, : self.length]
            self._memory[layer] = new
        self.lengths = self.lengths[rows]
        self.starts = None if self.starts is None else self.starts[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self._view()

    def shift(self, columns: int) -> None:
        """Moves all rows by so many columns to the right or, if negative, to the left, where no row may use them.

        Raises ValueError for a fixed cache, one with a mask, or a row that uses columns that would be lost.
        """
        if self.fixed or self.mask is not None or self.starts is None:
            raise ValueError("gpt2fast.Cache: shift must not be called on a fixed cache, or without starts alone")
        if columns < -int(self.starts.min()):
            raise ValueError(f"gpt2fast.Cache: shift must keep all columns in use, got {columns}")
        length = self.length + columns
        self.reserve(length)
        for memory in self._memory:
            used = memory[:, :, :, max(-columns, 0) : self.length].clone()
            memory[:, :, :, max(columns, 0) : length] = used
        self.length, self.lengths, self.starts = length, self.lengths + columns, self.starts + columns

    def place(self, row: int, other: "Cache") -> None:
        """Replaces a row by the only one of another cache without padding. The other rows keep their contents."""
        if other.length > self.length:
            self.shift(other.length - self.length)
        first = self.length - other.length
        for memory, new in zip(self._memory, other._memory, strict=True):
            memory[:, row, :, first : self.length] = new[:, 0, :, : other.length]
        self.starts[row] = first

    def copy_columns(self, other: "Cache", columns: int) -> None:
        """Fills an empty cache with the first columns of another one of the same batch, without padding."""
        self.advance(columns)
        for memory, new in zip(self._memory, other._memory, strict=True):
            memory[:, :, :, :columns] = new[:, :, :, :columns]

    def drop(self, tokens: int) -> None:
        """Takes back the last ``tokens`` columns. Raises ValueError for more than there are, or in a fixed cache."""
        if self.fixed or not 0 <= tokens <= self.length:
            found = "a fixed cache" if self.fixed else f"{tokens} of {self.length}"
            raise ValueError(f"gpt2fast.Cache: drop takes back columns that are there, got {found}")
        self.length -= tokens
        self.lengths = self.lengths - tokens
        if self.mask is not None:
            self.mask[:, self.length :] = True

    def clear(self) -> None:
        """Empties the cache and keeps its memory."""
        self.length, self.lengths = 0, torch.zeros_like(self.lengths)
        self.starts = self.mask = None
        self.fixed = False

    def fix(self) -> None:
        """Makes the cache a fixed one, until ``clear``. The caller must make sure that ``capacity`` is large enough.

        Raises ValueError where a mask hides columns other than padding on the left.
        """
        if self.mask is not None:
            raise ValueError("gpt2fast.Cache: mask must be None in a fixed cache, got one that hides more than starts")
        if self._fixed is None:
            self._fixed = torch.empty_like(self.lengths), torch.empty_like(self.lengths)
        lengths, starts = self._fixed
        self.lengths = lengths.copy_(self.lengths)
        self.starts = None if self.starts is None else starts.copy_(self.starts)
        self.fixed = True
