"""What a run imports; tests/train/forks.py forks the process that has imported this."""

import deepspeed  # noqa: F401 forks find it imported
import deepspeed.runtime.zero.stage3  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch
import torch._dynamo  # noqa: F401 the optimizer imports it
import torch.utils.tensorboard  # noqa: F401

import prismer.training.trainer  # noqa: F401
from prismer.training import zero

zero._import_muon()
torch.set_num_threads(1)
