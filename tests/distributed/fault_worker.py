"""The command as one of torchrun's processes, to which something happens, once.

Usage: fault_worker.py FAULTS.json ARGUMENT ...; the file holds a list of objects:
    rank      which process; null is each
    step      before which it happens; where `at` is save, in the midst of whose checkpoint; where it is start, 0
    do        one of `DEEDS`
    more      an argument of the deed
"""

import functools
import json
import os
import resource
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch

from diffusion_moe.cli import main
from diffusion_moe.storage import writing
from diffusion_moe.training import loop

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", "0"))


def raise_signal(number):
    """To this process."""
    os.kill(os.getpid(), number)


def kill_all(number):
    """To torchrun and this process; each of the others does the same."""
    os.kill(os.getppid(), number)
    raise_signal(number)


def tell_torchrun(number):
    """To torchrun, and wait until it has passed the signal on: no step may come between."""
    heard, usual = threading.Event(), signal.getsignal(number)

    def hear(number, frame):
        heard.set()
        usual(number, frame)

    signal.signal(number, hear)
    os.kill(os.getppid(), number)
    while not heard.wait(0.05):  # back to Python, which may have a handler to call
        pass


def kill_torchrun(number):
    """To torchrun, and wait until it is gone."""
    parent, pause = os.getppid(), threading.Event()
    os.kill(parent, number)
    while os.getppid() == parent:
        pause.wait(0.01)


def be_patient(seconds):
    """For so long with others that do not answer, from the next group of processes on."""
    loop.PATIENCE = timedelta(seconds=seconds)


def fill_disk(path):
    """With a file that takes all that is left."""
    with Path(path).open("wb", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def limit_files(size):
    """As if the disk ended there: larger files cannot be written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def save_for_ever(_):
    """A disk that does not answer."""
    threading.Event().wait()


DEEDS = {
    deed.__name__: deed
    for deed in (
        *(raise_signal, kill_all, tell_torchrun, kill_torchrun),
        *(be_patient, fill_disk, limit_files, save_for_ever),
    )
}


def comes_to(at, step, faults):
    """Do what is to happen here, unless it has."""
    for number, fault in enumerate(faults):
        if (fault["at"], fault["step"]) == (at, step) and fault["rank"] in (None, RANK):
            marker = Path(f"{sys.argv[1]}.{number}.{RANK}")
            if not marker.exists():
                marker.touch()
                DEEDS[fault["do"]](fault["more"])


def hook(faults):
    """Let the engine pass by `comes_to`."""
    train_step, write_safetensors = loop.train_step, writing.write_safetensors

    @functools.wraps(train_step)
    def step_after_fault(state, *arguments):
        comes_to("step", state.step + 1, faults)
        return train_step(state, *arguments)

    @functools.wraps(write_safetensors)
    def write_half(path, entries):
        record = write_safetensors(path, entries)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        comes_to("save", int(path.parent.stem[5:]), faults)
        path.write_bytes(whole)
        return record

    loop.train_step = step_after_fault
    if any(fault["at"] == "save" for fault in faults):
        writing.write_safetensors = write_half


if __name__ == "__main__":
    Path(f"{sys.argv[1]}.pid.{os.getpid()}").touch()  # so that the test leaves nobody behind
    faults = json.loads(Path(sys.argv[1]).read_text())
    hook(faults)
    comes_to("start", 0, faults)
    sys.exit(main(sys.argv[2:]))
