"""Documents packed in rows: where each ends, and how long it is."""

import torch
import torch.nn.functional as F


def document_ends(position_ids: torch.Tensor, batch: int) -> torch.Tensor | None:
    """Where in its row each token's document ends, (batch, seq) int64; `None` if each row is one document.

    A document starts wherever a position does not follow the one before it (transformers' packing convention). The
    answer is read back from the device, so call this once per forward.

    Args:
        position_ids: (batch or 1, seq).
    """
    seq = position_ids.shape[1]
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not restarts.any():
        return None
    starts = torch.arange(1, seq, device=position_ids.device).where(restarts, seq)
    ends = F.pad(starts, (0, 1), value=seq).flip(-1).cummin(-1).values.flip(-1)
    return ends.expand(batch, -1)


def document_lengths(document_ends: torch.Tensor) -> list[int]:
    """Lengths of all rows' documents in order; reads them back from the device."""
    batch, seq = document_ends.shape
    rows = torch.arange(batch, device=document_ends.device)[:, None] * seq
    return (document_ends + rows).flatten().unique_consecutive(return_counts=True)[1].tolist()
