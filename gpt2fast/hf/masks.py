"""Small attention masks: a padding mask (B, S) and a flag for causal.

A full mask (B, 1, T, S) is made only where a layer needs it.
"""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.utils.import_utils import is_tracing


class Visible(NamedTuple):
    """The keys that a query sees. ``theirs`` is the mask for transformers' attention, made only if a layer needs it."""

    padding: Tensor | None = None  # (B, S) bool, False hides a key
    bias: Tensor | None = None  # (B or 1, H or 1, T, S), added to the scores
    length: int | None = None  # only the first keys of a static cache are in use; None: all
    causal: bool = True
    theirs: Tensor | None = None


# The functions that make transformers' masks, to notice one that is replaced.
_MAKERS = {name: getattr(stock, name) for name in ("create_causal_mask", "create_bidirectional_mask")}
_SDPA_MASK = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def maker_obstacle() -> str | None:
    """Says which function that makes masks is replaced, so that our masks would differ from transformers'; or None."""
    for name, known in _MAKERS.items():
        if getattr(stock, name) is not known:
            return f"{name} is replaced"
    return None if ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is _SDPA_MASK else "another mask is registered as 'sdpa'"


def _make(name: str, config, embeds: Tensor, mask, **options):
    """Calls transformers' function of that name, by keywords. The names of the keywords differ between releases."""
    words = list(inspect.signature(_MAKERS[name]).parameters)[:3]
    return getattr(stock, name)(**dict(zip(words, (config, embeds, mask))), **options)


def theirs(mask):
    return mask.theirs if isinstance(mask, Visible) else mask


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a mask for torch's attention to a 4D additive one. In a bool mask, True means seen; others are added.

    Errors: ValueError for a dtype that torch's attention does not add either, such as int64.
    """
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        raise ValueError(
            f"gpt2fast: a 4D attention_mask must be bool, float32 or as the model is, {dtype}, got {mask.dtype}"
        )
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.dtype == torch.bool:
        return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.to(dtype)


def from_theirs(mask: Tensor | None, T: int, S: int, dtype: torch.dtype, is_causal: bool) -> Visible:
    """Converts transformers' own mask to a Visible with the same meaning.

    There, None with T > 1 means causal over the first T keys.
    """
    if mask is not None:
        return Visible(bias=as_bias(mask, dtype), causal=False)
    causal = is_causal and T > 1
    return Visible(length=T if causal and S > T else None, causal=causal)


def _first_full_layer(past) -> int:
    """The first layer whose cache keeps all tokens. Older releases of transformers have no function for it."""
    if (find := getattr(masking_utils, "find_first_full_attention_index", None)) is not None:
        return find(past)
    sliding = getattr(past, "is_sliding", [])
    return sliding.index(False) if False in sliding else 0


def padding_mask(mask: Tensor, B: int, T: int, past) -> Tensor:
    """Converts a mask of up to three dimensions to (B, S).

    Errors: ValueError where the mask has fewer columns than there are keys so far, or more than a static cache has.
    transformers would cut or fill such a mask without an error.
    """
    columns, least, most = mask.shape[-1], T, T
    if past is not None:
        layer = _first_full_layer(past)
        most, skipped = past.get_mask_sizes(T, layer)
        before = past.get_query_offset(layer)
        least = T if skipped or isinstance(before, Tensor) else before + T
    if mask.numel() != B * columns or not least <= columns <= most:
        expected = f"({B}, {least})" + (f" to ({B}, {most})" if least < most else "")
        raise ValueError(f"gpt2fast: attention_mask must have shape (B, S) = {expected}, got {tuple(mask.shape)}")
    return mask.view(B, columns)


def _padding(mask: Tensor, S: int, device: torch.device) -> Tensor | None:
    """The mask (B, S) as bools, or None where it hides nothing."""
    mask = mask.to(device=device, dtype=torch.bool)[:, :S]
    return None if not is_tracing(mask) and bool(mask.all()) else mask


def self_attention_mask(config, embeds: Tensor, mask, past, positions: Tensor | None, fused: bool, full: bool):
    """The mask for every block: a Visible where some block's attention is fused, else transformers' own mask.

    ``positions`` are those that the user gave (None: the default ones). transformers recognises packed sequences by
    them. ``full`` says that some layer still needs transformers' mask.
    """

    def full_mask():
        return _make("create_causal_mask", config, embeds, mask, past_key_values=past, position_ids=positions)

    if not fused:
        return full_mask()
    made = full_mask() if full else None
    T = embeds.shape[1]
    found = _small(embeds, mask, past, positions, T)
    if found is None:
        made = made if full else full_mask()
        found = from_theirs(made, T, T, embeds.dtype, True)
    return found._replace(theirs=made)


def _small(embeds: Tensor, mask, past, positions, T: int) -> Visible | None:
    """The Visible without transformers' mask, or None in the cases that only transformers' own code handles.

    These are 4D masks, packed sequences, sliding caches and traced static caches.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return None
    if past is None:
        if mask is None:
            return Visible() if positions is None else None
        return Visible(padding=_padding(mask, mask.shape[1], embeds.device))
    layer = _first_full_layer(past)
    S, skipped = past.get_mask_sizes(T, layer)
    before = past.get_query_offset(layer)
    if isinstance(before, Tensor):
        if is_tracing(before):
            return None
        before = int(before)
    if skipped or before + T > S:
        return None
    length = None if before + T == S else before + T
    return Visible(padding=None if mask is None else _padding(mask, before + T, embeds.device), length=length)


def cross_attention_mask(config, embeds: Tensor, mask, encoder: Tensor, fused: bool, full: bool):
    def full_mask():
        return _make("create_bidirectional_mask", config, embeds, mask, encoder_hidden_states=encoder)

    if not fused:
        return full_mask()
    made = full_mask() if full else None
    if mask is None:
        return Visible(causal=False, theirs=made)
    if mask.dim() == 2:
        return Visible(padding=_padding(mask, encoder.shape[1], embeds.device), causal=False, theirs=made)
    made = made if full else full_mask()
    return from_theirs(made, embeds.shape[1], encoder.shape[1], embeds.dtype, False)._replace(theirs=made)
