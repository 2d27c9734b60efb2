"""The loss over several processes: a split vocabulary, and a head sharded by FSDP2."""

import losses_multiprocess
import pytest
from torch import multiprocessing

pytestmark = pytest.mark.slow  # every process imports torch


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_split_vocabulary_equals_the_whole_one(tmp_path, world_size):
    multiprocessing.spawn(
        losses_multiprocess.vocab_parallel, (world_size, str(tmp_path)), nprocs=world_size
    )


def test_a_head_sharded_by_fsdp_gets_the_gradient_of_one_process(tmp_path):
    multiprocessing.spawn(losses_multiprocess.sharded_head, (2, str(tmp_path)), nprocs=2)
