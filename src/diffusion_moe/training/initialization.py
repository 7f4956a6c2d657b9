"""Initialization from another model: with other classes, frozen parameters, adapters or upcycled experts.

Adapters and frozen parameters follow from the recipe; only a new run reads the other model.
"""

from __future__ import annotations

import difflib
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import InitConfig, ModelConfig, Recipe, names_where
from ..models import Backbone, make_model
from ..models.adapters import LABEL_TABLE, add_adapters, merged, save_adapters, targets_of
from ..randomness import normal
from ..storage.shards import local_tensor
from .upcycling import upcycled

NEW_ROW_STD = 0.02
"""Standard deviation of new classes' rows around the mean of the old ones; also that of fresh tables."""
TABLE = f"{LABEL_TABLE}.weight"
FREE = frozenset().union(*(names_where(ModelConfig, affects=part) for part in ("nothing", "labels", "positions")))
"""Settings that may differ from those of the checkpoint to start from."""
UPCYCLED = names_where(ModelConfig, group="experts", affects="weights")
"""Settings that upcycling decides."""


class Pretrained(NamedTuple):
    """The model that training starts from."""

    name: str
    """Its name in messages."""
    model: Backbone
    """The model, on the CPU."""
    class_names: tuple[str, ...] = ()
    """Names of its classes, if known."""
    latent_space: Mapping[str, Any] | None = None
    """Latent space of a model of latents, if known; see `data.latent_space`."""


def freeze_and_add_adapters(model: Backbone, init: InitConfig) -> Backbone:
    """Add the recipe's adapters to a fresh model, in place, and freeze the parameters of init.freeze.

    Raises:
        ValueError: a pattern or a target matches no parameter, or all parameters are frozen.
    """
    if init.lora_rank is not None:
        add_adapters(model, init.lora_rank, init.lora_alpha, init.lora_targets)
    parameters = dict(model.named_parameters())
    for pattern in init.freeze:
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"init.freeze has {pattern}, which matches no parameter; {_suggestion(pattern, model)}")
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"init.freeze is {', '.join(init.freeze)}, which freezes all parameters; remove some")
    return model


def make_trainable(recipe: Recipe) -> Backbone:
    """A fresh model of a recipe, with its adapters and frozen parameters."""
    return freeze_and_add_adapters(make_model(recipe.model), recipe.init)


def share_frozen(model: Backbone, emas: Sequence[Backbone]) -> None:
    """Let EMAs share the memory of the model's frozen parameters; only on one process."""
    parameters = dict(model.named_parameters())
    for ema in emas:
        for name, parameter in ema.named_parameters():
            if not parameters[name].requires_grad:
                parameter.data = parameters[name].data


@torch.no_grad()
def copy_frozen(model: Backbone, emas: Iterable[Backbone]) -> None:
    """Copy the model's frozen parameters to its EMAs; a checkpoint holds them once."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for ema in emas:
        for name, parameter in ema.named_parameters():
            if name in frozen:
                local_tensor(parameter).copy_(local_tensor(frozen[name]))


def initialize_from(model: Backbone, recipe: Recipe, pretrained: Pretrained, data: Mapping[str, Any]) -> list[str]:
    """Fill a fresh model, still without adapters, with another's weights.

    Args:
        data: metadata of the data set, with the names of its classes.

    Returns:
        Lines for the user: what was changed, and which tensors are new.

    Raises:
        ValueError: the recipe contradicts the other model; the message names both values.
    """
    init, old, new = recipe.init, pretrained.model.settings, model.settings
    check_settings(pretrained.name, old, new, init.upcycle)
    notes = [f"starting from {pretrained.name}"]
    state = dict(pretrained.model.state_dict())
    if init.upcycle:
        state, lines = upcycled(pretrained.model, model, init.upcycle_noise, recipe.training.seed)
        notes += lines
    table = state.pop(TABLE, None)
    if table is not None and new.num_classes:
        rows = label_rows(old, new, pretrained.class_names, data["class_names"])
        if init.lora_rank is not None and None in rows and not targets_of(model, init.lora_targets).label_table:
            raise ValueError(
                f"{rows.count(None)} classes are new to {pretrained.name}, and adapters cannot learn their rows; add "
                f"{LABEL_TABLE} to init.lora_targets, which trains the whole label table"
            )
        state[TABLE] = relabelled(table, rows, old.num_classes, recipe.training.seed)
        notes += _label_notes(rows, new, pretrained, data["class_names"])
    if new.sample_size != old.sample_size:
        notes.append(_resize(state, old, new))
    fresh = model.state_dict()
    excess = [name for name in state if name not in fresh]
    # Routers without balance have no correction bias.
    assert all(name.endswith("e_score_correction_bias") for name in excess), excess
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in fresh}, strict=False)
    missing = [name for name in fresh if name not in state]
    if missing:
        notes.append(f"newly initialized: {_listed(missing)}")
    return notes + _latent_notes(pretrained, data)


def check_settings(name: str, old: ModelConfig, new: ModelConfig, upcycle: bool) -> None:
    """Check that a model of the new settings can take the weights of the old one, whose name is for messages.

    Raises:
        ValueError: the weights do not fit the new settings.
    """
    if upcycle and old.router != "dense":
        raise ValueError(f"init.upcycle is true, but {name} already has experts (router {old.router}); remove it")
    free = FREE | UPCYCLED if upcycle else FREE
    for field, value in vars(new).items():
        if field not in free and value != getattr(old, field):
            remedy = (
                "; init.upcycle makes experts of a dense model" if field == "router" and old.router == "dense" else ""
            )
            raise ValueError(
                f"model.{field} is {value}, but that of {name} is {getattr(old, field)}; remove it, or start from "
                f"another model{remedy}"
            )
    if old.num_classes and not new.num_classes:
        raise ValueError(f"model.num_classes is 0, but {name} has {old.num_classes} classes; remove it")
    if new.sample_size != old.sample_size and (new.position == "rope1d" or new.sliding_window):
        reason = "model.position rope1d" if new.position == "rope1d" else "model.sliding_window"
        raise ValueError(
            f"model.sample_size is {new.sample_size}, but that of {name} is {old.sample_size}, and {reason} counts "
            "tokens along rows of a constant length; remove it"
        )


def label_rows(
    old: ModelConfig, new: ModelConfig, old_names: Sequence[str], new_names: Sequence[str]
) -> list[int | None]:
    """The old row of each row of the new label table; None for a new class. The null class is last.

    Classes match by name; by number if the tables have equal sizes and no name in common.
    """
    row_of = {name: row for row, name in enumerate(old_names)}
    rows: list[int | None] = [row_of.get(name) for name in new_names]
    if old.num_classes == new.num_classes and not any(row is not None for row in rows):
        rows = list(range(new.num_classes))
    null: int | None = old.num_classes if old.null_class else None
    return [*rows, null] if new.null_class else rows


def relabelled(table: Tensor, rows: Sequence[int | None], classes: int, seed: int) -> Tensor:
    """A label table of rows of another (see `label_rows`); new ones are the mean of its `classes` plus normal noise."""
    noise = normal(seed, "new classes", 0, torch.arange(len(rows)), (table.shape[1],)).to(table.dtype)
    new = table[:classes].mean(0) + NEW_ROW_STD * noise
    kept = [index for index, row in enumerate(rows) if row is not None]
    new[kept] = table[[row for row in rows if row is not None]]
    return new


def merge_adapters(model: Backbone, init: InitConfig, folder: Path | None) -> Backbone:
    """A trained model with its adapters merged; they are also saved separately if a folder is given."""
    if init.lora_rank is None:
        return model
    if folder is not None:
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_adapters(model, partial, LABEL_TABLE in init.lora_targets)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return merged(model)


def _label_notes(
    rows: Sequence[int | None], config: ModelConfig, pretrained: Pretrained, class_names: Sequence[str]
) -> list[str]:
    classes, null = rows[: config.num_classes], rows[config.num_classes :]
    names, lines = set(pretrained.class_names), []
    if tuple(class_names) == pretrained.class_names:
        pass
    elif classes == list(range(len(classes))) and names.isdisjoint(class_names):
        why = "has no class of an equal name" if names else "names no classes"
        lines.append(f"label table: all {len(classes)} rows are kept, by number, because {pretrained.name} {why}")
    else:
        kept, new = sum(row is not None for row in classes), classes.count(None)
        lines.append(
            f"label table: {kept} of {len(classes)} rows are kept, by the names of the classes; {new} are new, the "
            "mean of all old ones plus noise"
        )
    return lines + (["label table: the row of no class is new"] if null == [None] else [])


def _resize(state: dict[str, Tensor], old: ModelConfig, new: ModelConfig) -> str:
    """Adapt positions to another image size; returns a line for the user."""
    change = f"model.sample_size is {new.sample_size} instead of {old.sample_size}"
    if "pos_embed" not in state:
        return f"{change}: rotary positions continue with the same step"
    before, after = (config.sample_size // config.patch_size for config in (old, new))
    table_1DHW = state["pos_embed"].T.unflatten(1, (before, before))[None]
    resized = F.interpolate(table_1DHW.float(), size=(after, after), mode="bicubic", align_corners=False)
    state["pos_embed"] = resized[0].flatten(1).T.contiguous()
    return f"{change}: the table of positions is interpolated" + (
        ", rotary positions continue with the same step" if new.rotary_axes else ""
    )


def _latent_notes(pretrained: Pretrained, data: Mapping[str, Any]) -> list[str]:
    before, now = pretrained.latent_space, data.get("latent_space")
    if before is None or now is None:
        return []
    return [
        f"warning: the data's latents differ from those of {pretrained.name} in {name}: {now[name]}, not {before[name]}"
        for name in ("encoder_sha256", "scaling")
        if now[name] != before[name]
    ]


def _listed(names: Sequence[str]) -> str:
    """Names with their number, one for all blocks."""
    counts = Counter(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def _suggestion(pattern: str, model: Backbone) -> str:
    names = [name for name, _ in model.named_parameters()]
    parts = {f"{name.rsplit('.', end)[0]}.*" for name in names for end in range(1, name.count(".") + 1)}
    parts |= set(names) | {f"*.{name.split('.', 2)[2]}" for name in names if name.startswith("blocks.")}
    near = difflib.get_close_matches(pattern, sorted(parts), n=3, cutoff=0.5) or ["blocks.0.*", "*.attn.*", names[-1]]
    return f"did you mean {' or '.join(near)}?"
