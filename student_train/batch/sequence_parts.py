"""Parts of micro-batches, cut along the tokens, for processes that share every trace.

Letters as in `micro_batch`; P processes of a team.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from student_train.batch.micro_batch import MicroBatch, RowLengths


@dataclass(frozen=True)
class SequencePart:
    """One process' part of every row: the tokens from member / P on, T / P of them."""

    member: int = 0  # of the team
    team_size: int = 1  # P

    def of(self, batch: MicroBatch) -> MicroBatch:
        """This part of a micro-batch of the layout "alone" or "flat".

        Rows are padded to a multiple of P. What is counted by trace and not by token, the first
        part counts for all.
        """
        if self.team_size == 1:
            return batch
        num_rows, width = batch.input_ids.shape
        own_width = -(-width // self.team_size)
        begin = self.member * own_width
        num_padding = own_width * self.team_size - width
        positions = batch.position_ids
        if positions is None:
            positions = torch.arange(width, dtype=torch.int32).expand(num_rows, -1)
        # No token sees padding, so its positions need only be some that the student has.
        input_ids = pad(batch.input_ids, (0, num_padding))
        positions = pad(positions, (0, num_padding))
        lengths = None if batch.trace_ends is None else batch.trace_ends.diff().tolist()
        if lengths is not None:
            lengths[-1] += num_padding
        row, column = batch.hidden_index // width, batch.hidden_index % width - begin
        (kept,) = ((column >= 0) & (column < own_width)).nonzero(as_tuple=True)
        is_first = self.member == 0
        return replace(
            batch,
            input_ids=input_ids[:, begin : begin + own_width].contiguous(),
            position_ids=positions[:, begin : begin + own_width].contiguous(),
            trace_ends=None,
            lengths_in_row=None if lengths is None else RowLengths(tuple(lengths)),
            row_lengths=(batch.row_lengths - begin).clamp(0, own_width),
            hidden_index=(row * own_width + column)[kept],
            targets=batch.targets.select(kept),
            token_weight=batch.token_weight[kept],
            source=batch.source[kept],
            rollout_logprob=batch.rollout_logprob[kept],
            num_positions=batch.num_positions if is_first else (),
            num_absent=batch.num_absent if is_first else 0,
            num_distributions=batch.num_distributions if is_first else 0,
            num_hard_labels=batch.num_hard_labels if is_first else 0,
            num_left_out=batch.num_left_out if is_first else 0,
        )


WHOLE_SEQUENCE = SequencePart()
