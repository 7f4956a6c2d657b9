"""The command as one of torchrun's processes, with a quick classifier and small parts; may be made to die midway.

Usage: command_worker.py PARTS ARGUMENT ...; after that many parts of features it kills itself (0: never).
"""

import os
import signal
import sys

import torch

from diffusion_moe.cli import main
from diffusion_moe.evaluation import classifier, extract_features

torch.set_num_threads(1)
classifier.EPOCHS = 1
extract_features.PART = 10
parts, work = int(sys.argv[1]), extract_features._extract_part
done = 0


def work_and_die(*arguments):
    """A part; after the last one allowed, what `kill -9` does."""
    global done
    work(*arguments)
    done += 1
    if done == parts:
        os.kill(os.getpid(), signal.SIGKILL)


extract_features._extract_part = work_and_die
sys.exit(main(sys.argv[2:]))
