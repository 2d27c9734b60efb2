"""Processes of the tests of the loss on gloo; started by test_sparse_kl_distributed."""

import os

import loss_cases
import torch
import torch.distributed as dist

from student_train.losses import Objective, VocabShard, sparse_kl, sparse_kl_per_token

NUM_VOCAB = 37
# First ids of each process: uneven, and less than the kept entries of some row.
STARTS = {2: [0, 23], 4: [0, 3, 20, 31]}
OBJECTIVES = [
    Objective(ce_weight=0.3),
    Objective(divergence="jsd", softcap=3.0, ce_weight=0.0),
    Objective(tail="zero", logit_scale=0.5, ce_weight=0.0),
    Objective(tail="renormalise", temperature=2.0, ce_weight=0.4),
]


def join(rank, world_size, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def vocab_parallel(rank, world_size, folder):
    """Every objective on a part of the vocabulary, against the same on the whole."""
    torch.set_num_threads(1)
    join(rank, world_size, folder)
    hidden, weight, targets, token_weight = loss_cases.ragged_case(num_vocab=NUM_VOCAB)
    bias = torch.linspace(-1, 1, NUM_VOCAB, dtype=torch.float64)
    start = STARTS[world_size][rank]
    stop = [*STARTS[world_size], NUM_VOCAB][rank + 1]
    shard = VocabShard(dist.group.WORLD, start, NUM_VOCAB)

    def run(function, parts, objective, shard=None):
        operands = leaves(*parts)
        extra = (token_weight,) if function is sparse_kl else ()
        output = function(
            *operands[:2],
            targets,
            *extra,
            objective,
            bias=operands[2],
            chunk_bytes=900,
            shard=shard,
        )
        loss = output.loss if function is sparse_kl else (output.loss * token_weight).sum()
        grads = torch.autograd.grad(loss, operands)
        return output, loss, grads

    for function in (sparse_kl, sparse_kl_per_token):
        for objective in OBJECTIVES:
            whole, loss, grads = run(function, (hidden, weight, bias), objective)
            own = (hidden, weight[start:stop], bias[start:stop])
            part, part_loss, part_grads = run(function, own, objective, shard)
            expected = [grads[0], grads[1][start:stop], grads[2][start:stop]]
            torch.testing.assert_close(part_loss, loss, rtol=1e-13, atol=1e-13)
            for one, other in zip(part_grads, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
            for name in ("kl", "ce", "student_mass", "top1"):
                torch.testing.assert_close(getattr(part, name), getattr(whole, name))
    dist.destroy_process_group()


class Student(torch.nn.Module):
    """A body and a head, tied to the embedding or not, whose forward is the loss."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(NUM_VOCAB, 5, dtype=torch.float64)
        self.body = torch.nn.Linear(5, 5, dtype=torch.float64)
        self.head = torch.nn.Linear(5, NUM_VOCAB, bias=False, dtype=torch.float64)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, targets, token_weight):
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        return sparse_kl(hidden, self.head.weight, targets, token_weight).loss


def sharded_head(rank, world_size, folder):
    """Two ranks with half of the tokens each, `fully_shard`ed, against one with all of them."""
    torch.set_num_threads(1)
    join(rank, world_size, folder)
    mesh = dist.init_device_mesh("cpu", (world_size,))
    tokens = torch.arange(8)
    _, _, targets, token_weight = loss_cases.ragged_case(num_vocab=NUM_VOCAB)
    for tied in (False, True):
        alone, sharded = Student(tied), Student(tied)
        dist.fsdp.fully_shard(sharded, mesh=mesh)
        alone(tokens, targets, token_weight).backward()
        mine = slice(rank, None, world_size)
        # The gradients are averaged over ranks.
        loss = sharded(tokens[mine], targets.select(mine), token_weight[mine] * world_size)
        loss.backward()
        for (name, one), other in zip(alone.named_parameters(), sharded.parameters(), strict=True):
            assert isinstance(other.grad, dist.tensor.DTensor), name
            torch.testing.assert_close(other.grad.full_tensor(), one.grad, msg=name)
    dist.destroy_process_group()
