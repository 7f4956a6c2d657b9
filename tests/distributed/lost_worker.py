"""One of several processes, of which one is killed while the others wait.

Usage: lost_worker.py RANK HOW: the rank that is killed; the others wait for an event that never completes (`device`, as
under NCCL), or leave in good order (`done`), long before it.
"""

import os
import signal
import sys
import threading

import torch

from diffusion_moe.distributed import rank, torchrun_processes
from diffusion_moe.training.lost_process import ending_with_others
from diffusion_moe.training.measures import HostCopy


class NeverCompletes:
    """A device's event after the end of a process that the device waits for."""

    def query(self):
        """False, as it is not complete."""
        return False

    def synchronize(self):
        """Wait without Python's lock, as torch's events do; no signal is heard."""
        threading.Lock().acquire() and threading.Event().wait()


if __name__ == "__main__":
    killed, how = int(sys.argv[1]), sys.argv[2]
    with torchrun_processes(), ending_with_others():
        if rank() == killed:
            threading.Event().wait(3)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "device":
            copy = HostCopy({"loss": torch.tensor(1.0)})
            copy.arrived = NeverCompletes()
            copy.read()
    print("left", flush=True)
    os._exit(0)  # a group that has lost a process cannot be destroyed
