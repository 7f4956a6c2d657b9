"""Data sets that loading processes import."""

import os
import signal

import torch

from diffusion_moe.data.digits import Digits


class Processes:
    """Each batch is the identity of the process that reads it and of its parent, and whether SIGTERM ends it."""

    def __getitems__(self, sampled):
        return os.getpid(), os.getppid(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Ranges:
    """Many small tensors, as captions are."""

    def __init__(self, number):
        self.tensors = [torch.arange(i % 5, dtype=torch.float16) for i in range(number)]
        self.bfloat16 = torch.arange(3, dtype=torch.bfloat16)

    def __getitems__(self, sampled):
        return [self.tensors[i] for i in sampled], self.bfloat16


class DeadlyDigits(Digits):
    """Digits whose reading kills any process but this one, as the kernel does when memory is short."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.survivor = os.getpid()

    def read(self, indices):
        """A batch."""
        if os.getpid() != self.survivor:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(indices)
