"""Last weights of a run, from its newest checkpoint; the model folders of a run have EMA weights only."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from ..models import Backbone, make_model
from ..run_folder import RunFolder
from ..storage import checkpoints_in, export
from .adapters import add_adapters, merged


def newest_checkpoint(run: RunFolder, option: str) -> Path:
    """Folder of a run's newest checkpoint.

    Args:
        run: the run.
        option: name of the option that asks for it, for the message.

    Raises:
        ValueError: there is none.
    """
    found = checkpoints_in(run.checkpoints)
    if not found:
        raise ValueError(f"{option} is model, but {run.path} has no checkpoint, only EMA weights; set {option} to ema")
    return found[0]


def last_weights(run: RunFolder, option: str) -> Backbone:
    """Load the model of a run's newest checkpoint, with adapters merged, in eval mode on the CPU.

    Args:
        run: the run.
        option: name of the option that asks for it, for the message.

    Raises:
        ValueError: there is no run or no checkpoint, it is damaged, or peft is not installed for a run of adapters.
    """
    from safetensors.torch import load_file

    checkpoint, recipe = newest_checkpoint(run, option), run.read_recipe()
    model, init = make_model(recipe.model), recipe.init
    if init.lora_rank is not None:
        add_adapters(model, init.lora_rank, init.lora_alpha, init.lora_targets)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        try:
            export(checkpoint, "model.", file)
            model.load_state_dict(load_file(file))
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{option} is model, but {checkpoint} cannot be read: {reason}; set {option} to ema"
            ) from error
    return (model if init.lora_rank is None else merged(model)).eval()
