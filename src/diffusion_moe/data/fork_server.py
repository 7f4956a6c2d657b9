"""Imports and signals of the fork server, from which loading processes are forked (see `workers`).

Only the server imports this module.
"""

import os
import signal
import sys

from . import image_files, latents  # noqa: F401  # imported once, for all that are forked

# The server has to outlive a signal to all processes: torch takes the workers for dead without it, but the training
# loop needs them until it has saved. What is forked has the usual handler again.
if any("multiprocessing.forkserver" in argument for argument in sys.orig_argv):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
