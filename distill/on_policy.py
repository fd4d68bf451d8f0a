"""On-policy distillation: in some lanes the student reads what it writes itself, and the teacher judges that.

A student that has only ever read good text does not know what to do after a mistake of its own. In generalised
knowledge distillation (Agarwal et al. 2023, arXiv 2306.13649) a share lambda of the text is therefore the student's
own, sampled as it stands, and the divergence from the teacher is taken there; sampling itself is not differentiated.

A written block takes the place of a lane's block of text: it begins from a zero state with the first P tokens of that
block and is gone on with by the student to the block's length. Where the student writes a separator, a document ends
and the next begins from nothing, as in any block. Its labels are -1: there is no right answer for cross-entropy. The
teacher reads it from its beginning, behind separators that are a document of their own.

The same lanes are written in all steps of a stage, evenly spread, so that the others carry their states on as ever.
Each lane draws from a generator of its own, seeded by run, step and lane. All lanes of a process are written side by
side however they are cut into micro-batches; other numbers of processes change what is written by rounding alone, which
moves a draw to another token now and then.

Legend: B lanes of a micro-batch, b of these that are written, T tokens of a block, P of its prompt, W = context + T.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.config import StageConfig
from distill.corpus import BlockBatch
from distill.sampling import Sampler
from distill.student import LSTMCache, LSTMForCausalLM

Batch = tuple[BlockBatch, Tensor]  # blocks, and where their lanes' states are zeroed


def written_lanes(lanes: int, share: float) -> np.ndarray:
    """Which lanes (G,) the student writes: `share` of them, rounded to a whole number, evenly spread."""
    count = round(share * lanes)
    return np.diff(np.arange(lanes + 1) * count // lanes) > 0


class BlockWriter:
    """Writes the blocks of a process's written lanes with the student as it stands."""

    def __init__(
        self,
        student: LSTMForCausalLM,
        stage: StageConfig,
        *,
        lanes: range,
        of: int,
        separator_id: int,
        reset_at_documents: bool,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        """`lanes` of all the lanes are this process's. The student writes in `dtype`."""
        self.student, self.stage, self.lanes, self.seed = student, stage, lanes, seed
        self.is_written = written_lanes(of, stage.student_written)[lanes.start : lanes.stop]
        self.separator_id, self.reset_at_documents = separator_id, reset_at_documents
        scribe: Any = copy.deepcopy(student)
        self.scribe: LSTMForCausalLM = scribe.to(dtype).eval()

    def rewrite(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        """A step's micro-batches, in the order of the lanes, with the written lanes in place of their text."""
        sizes = [len(reset_BT) for _, reset_BT in batches]
        rows = [torch.from_numpy(part).nonzero()[:, 0] for part in np.split(self.is_written, np.cumsum(sizes)[:-1])]
        inputs = [batch.inputs_BT[rows_b] for (batch, _), rows_b in zip(batches, rows, strict=True)]
        lanes = np.array(self.lanes)[self.is_written]
        if not len(lanes):
            return list(batches)
        tokens_bT = self.write(torch.cat(inputs), [(self.seed, step, int(lane)) for lane in lanes])
        pieces = tokens_bT.split([len(rows_b) for rows_b in rows])
        return [self._put(*batch, *parts) for batch, *parts in zip(batches, rows, pieces, strict=True)]

    @torch.no_grad()
    def write(self, text_bT: Tensor, seeds: Sequence[tuple[int, ...]]) -> Tensor:
        """Blocks (b, T) that begin as the text does; `seeds` are those of the rows."""
        self._copy_weights()
        samplers = [Sampler(self.stage.written_temperature, seed=seed) for seed in seeds]
        tokens_bT = text_bT.clone()
        device, cache = self.scribe.device, LSTMCache()
        begin, end = 0, self.stage.written_prompt
        while end < tokens_bT.shape[1]:
            read_bt = tokens_bT[:, begin:end].to(device)
            reset_bt = read_bt == self.separator_id if self.reset_at_documents else None
            cache = LSTMCache(*cache.state, seen_tokens=cache.seen_tokens)  # without the way back, which nobody goes
            z_btd = self.scribe.model(read_bt, past_key_values=cache, reset_mask=reset_bt).last_hidden_state
            logits_bV = self.scribe.lm_head(z_btd[:, -1]).float().cpu().numpy()
            chosen = [sampler.choose(logits_V) for sampler, logits_V in zip(samplers, logits_bV, strict=True)]
            tokens_bT[:, end] = torch.tensor(chosen)
            begin, end = end, end + 1
        return tokens_bT

    def _copy_weights(self) -> None:
        """Take over what training has changed."""
        for mine, theirs in zip(self.scribe.parameters(), self.student.parameters(), strict=True):
            if theirs.requires_grad:
                mine.copy_(theirs)

    def _put(self, batch: BlockBatch, reset_BT: Tensor, rows_b: Tensor, tokens_bT: Tensor) -> Batch:
        """A micro-batch with these tokens in these rows."""
        T = tokens_bT.shape[1]
        context = batch.window_BW.shape[1] - T
        starts_bT = tokens_bT == self.separator_id if self.reset_at_documents else torch.zeros_like(tokens_bT).bool()
        starts_bT[:, 0] = True
        place_T = torch.arange(T)
        began_bT = torch.where(starts_bT, place_T, 0).cummax(1).values
        before_bC = torch.full((len(rows_b), context), self.separator_id)
        positions_bC = torch.arange(context).expand(len(rows_b), -1)

        def put(whole: Tensor, part: Tensor) -> Tensor:
            return whole.index_copy(0, rows_b, part)

        written = replace(
            batch,
            inputs_BT=put(batch.inputs_BT, tokens_bT),
            labels_BT=batch.labels_BT.index_fill(0, rows_b, -1),
            reset_BT=put(batch.reset_BT, starts_bT),
            window_BW=put(batch.window_BW, torch.cat([before_bC, tokens_bT], 1)),
            positions_BW=put(batch.positions_BW, torch.cat([positions_bC, place_T - began_bT], 1)),
        )
        return written, put(reset_BT, starts_bT)
