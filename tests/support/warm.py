"""What the process that test workers are forked from has imported; it runs no thread and touches no device."""

import torch
import torch.distributed
import torch.optim
import torch.utils.data

import elastic_batch.trainer  # noqa: F401  # imported for its cost alone

# A parallel region before the fork would leave its children without the threads that they believe to have.
torch.set_num_threads(1)
