"""Where training begins: at the weights of another model, with other classes, frozen parts, adapters or experts.

What a run is made of (adapters, frozen parameters) follows from its recipe; a fresh run alone reads the other model.
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

from ..config import InitConfig, ModelConfig, Recipe
from ..models import Backbone, make_model
from ..models.adapters import LABEL_TABLE, add_adapters, merged, save_adapters, targets_of
from ..moe.parallel import local_part
from ..randomness import normal
from .upcycling import upcycled

NEW_ROW_STD = 0.02
"""Of the rows of new classes around the mean of the old ones; what fresh tables are drawn with."""
TABLE = f"{LABEL_TABLE}.weight"
LABELS, SIZE = {"num_classes", "null_class"}, {"sample_size"}
LOOSE = {
    *("dropout", "attention_dropout", "expert_dropout", "inference_pool", "threshold_decay", "capacity_loss_weight"),
    *("balance", "balance_weight", "balance_rate"),
}
"""Settings that no weight depends on."""
EXPERTS = {
    *("router", "num_experts", "expert_dim", "expert_activation", "expert_bias", "top_k", "capacity", "n_group"),
    *("topk_group", "routed_scaling_factor", "shared", "shared_dim", "shared_bias", "moe_layer_freq", "first_k_dense"),
}
"""What upcycling decides."""


class Origin(NamedTuple):
    """The model that training begins from."""

    name: str
    """For messages."""
    model: Backbone
    """On the CPU."""
    class_names: tuple[str, ...] = ()
    """Where they are known."""
    latent_space: Mapping[str, Any] | None = None
    """Of a model of latents, where it is known: see `data.latent_space`."""


def freeze_and_add_adapters(model: Backbone, init: InitConfig) -> Backbone:
    """A fresh model, in place, with the recipe's adapters, and with what shall not learn frozen.

    Raises:
        ValueError: a pattern or a target names nothing, or nothing is left to learn.
    """
    if init.lora_rank is not None:
        add_adapters(model, init.lora_rank, init.lora_alpha, init.lora_targets)
    parameters = dict(model.named_parameters())
    for pattern in init.freeze:
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"init.freeze has {pattern}, but no parameter's name is like it; {_near(pattern, model)}")
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"init.freeze is {', '.join(init.freeze)}, which leaves nothing to learn")
    return model


def make_trainable(recipe: Recipe) -> Backbone:
    """A fresh model of a recipe, prepared."""
    return freeze_and_add_adapters(make_model(recipe.model), recipe.init)


def share_frozen(model: Backbone, averages: Sequence[Backbone]) -> None:
    """Let averages use the model's own frozen parameters; only on one process."""
    parameters = dict(model.named_parameters())
    for average in averages:
        for name, parameter in average.named_parameters():
            if not parameters[name].requires_grad:
                parameter.data = parameters[name].data


@torch.no_grad()
def copy_frozen(model: Backbone, averages: Iterable[Backbone]) -> None:
    """Give averages the model's frozen parameters, of which a checkpoint holds one copy."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for average in averages:
        for name, parameter in average.named_parameters():
            if name in frozen:
                local_part(parameter.data).copy_(local_part(frozen[name].data))  # type: ignore[union-attr, arg-type]


def initialize_from(model: Backbone, recipe: Recipe, origin: Origin, data: Mapping[str, Any]) -> list[str]:
    """Fill a fresh model, not yet prepared, with another's weights.

    Args:
        data: what the data set records, with the names of the classes.

    Returns:
        Lines for the user: what was changed, and what is drawn anew.

    Raises:
        ValueError: the recipe contradicts the other model; the message names both values.
    """
    init, old, new = recipe.init, origin.model.settings, model.settings
    check_settings(origin.name, old, new, init.upcycle)
    notes = [f"starting from {origin.name}"]
    state = dict(origin.model.state_dict())
    if init.upcycle:
        state, lines = upcycled(origin.model, model, init.upcycle_noise, recipe.training.seed)
        notes += lines
    table = state.pop(TABLE, None)
    if table is not None and new.num_classes:
        rows = label_rows(old, new, origin.class_names, data["class_names"])
        if init.lora_rank is not None and None in rows and not targets_of(model, init.lora_targets).label_table:
            raise ValueError(
                f"{rows.count(None)} classes are new to {origin.name}, and adapters cannot learn their rows; add "
                f"{LABEL_TABLE} to init.lora_targets, which trains the label table whole"
            )
        state[TABLE] = relabelled(table, rows, old.num_classes, recipe.training.seed)
        notes += _label_notes(rows, new, origin, data["class_names"])
    if new.sample_size != old.sample_size:
        notes.append(_resize(state, old, new))
    fresh = model.state_dict()
    excess = [name for name in state if name not in fresh]
    assert all(name.endswith("e_score_correction_bias") for name in excess), (
        excess
    )  # which a router without balance has not
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in fresh}, strict=False)
    notes += [f"drawn anew: {_listed(missing)}"] if (missing := [name for name in fresh if name not in state]) else []
    return notes + _latent_notes(origin, data)


def check_settings(name: str, old: ModelConfig, new: ModelConfig, upcycle: bool) -> None:
    """Whether a model of the new settings can take the old one's weights.

    Raises:
        ValueError: they contradict each other, or the change is one that weights do not survive.
    """
    if upcycle and old.router != "dense":
        raise ValueError(f"init.upcycle is true, but {name} has experts already (router {old.router}); leave it out")
    free = LABELS | SIZE | LOOSE | (EXPERTS if upcycle else set())
    for field, value in vars(new).items():
        if field not in free and value != getattr(old, field):
            remedy = (
                "; init.upcycle makes experts of a dense one" if field == "router" and old.router == "dense" else ""
            )
            raise ValueError(
                f"model.{field} is {value}, but that of {name} is {getattr(old, field)}; leave it out, or start from "
                f"another model{remedy}"
            )
    if old.num_classes and not new.num_classes:
        raise ValueError(f"model.num_classes is 0, but {name} has {old.num_classes} classes; leave it out")
    if new.sample_size != old.sample_size and (new.position == "rope1d" or new.sliding_window):
        reason = "model.position rope1d" if new.position == "rope1d" else "model.sliding_window"
        raise ValueError(
            f"model.sample_size is {new.sample_size}, but that of {name} is {old.sample_size}, and {reason} counts "
            "tokens along rows of one length; leave it out"
        )


def label_rows(
    old: ModelConfig, new: ModelConfig, old_names: Sequence[str], new_names: Sequence[str]
) -> list[int | None]:
    """For each row of the new label table the row it is taken from; None: a new one. The null class comes last.

    By the classes' names; by number where the tables are as large and no name is common to both.
    """
    place = {name: row for row, name in enumerate(old_names)}
    rows: list[int | None] = [place.get(name) for name in new_names]
    if old.num_classes == new.num_classes and not any(row is not None for row in rows):
        rows = list(range(new.num_classes))
    null: int | None = old.num_classes if old.null_class else None
    return [*rows, null] if new.null_class else rows


def relabelled(table: Tensor, rows: Sequence[int | None], classes: int, seed: int) -> Tensor:
    """A label table with these rows of another; new ones are the mean of its classes plus normal noise.

    Args:
        classes: rows of the table that are classes.
    """
    drawn = normal(seed, "new classes", 0, torch.arange(len(rows)), (table.shape[1],)).to(table.dtype)
    new = table[:classes].mean(0) + NEW_ROW_STD * drawn
    kept = [place for place, row in enumerate(rows) if row is not None]
    new[kept] = table[[row for row in rows if row is not None]]
    return new


def merge_adapters(model: Backbone, init: InitConfig, folder: Path | None) -> Backbone:
    """A trained model without adapters: they are merged, and saved by themselves if a folder is given."""
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
    rows: Sequence[int | None], config: ModelConfig, origin: Origin, class_names: Sequence[str]
) -> list[str]:
    classes, null = rows[: config.num_classes], rows[config.num_classes :]
    names, lines = set(origin.class_names), []
    if tuple(class_names) == origin.class_names:
        pass
    elif classes == list(range(len(classes))) and names.isdisjoint(class_names):
        why = "has no class of an equal name" if names else "names no classes"
        lines.append(f"label table: all {len(classes)} rows are kept, by number, as {origin.name} {why}")
    else:
        kept, new = sum(row is not None for row in classes), classes.count(None)
        lines.append(
            f"label table: {kept} of {len(classes)} rows are kept, by the names of the classes; {new} are new, the "
            "mean of all old ones plus noise"
        )
    return lines + (["label table: the row of no class is new"] if null == [None] else [])


def _resize(state: dict[str, Tensor], old: ModelConfig, new: ModelConfig) -> str:
    """Positions for another image size; returns a line for the user."""
    told = f"model.sample_size is {new.sample_size} instead of {old.sample_size}"
    if "pos_embed" not in state:
        return f"{told}: rotary positions go on with the same step"
    before, after = (config.sample_size // config.patch_size for config in (old, new))
    table_1DHW = state["pos_embed"].T.unflatten(1, (before, before))[None]
    resized = F.interpolate(table_1DHW.float(), size=(after, after), mode="bicubic", align_corners=False)
    state["pos_embed"] = resized[0].flatten(1).T.contiguous()
    return f"{told}: the table of positions is interpolated" + (
        ", rotary positions go on with the same step" if new.rotary_axes else ""
    )


def _latent_notes(origin: Origin, data: Mapping[str, Any]) -> list[str]:
    before, now = origin.latent_space, data.get("latent_space")
    if before is None or now is None:
        return []
    return [
        f"warning: the data's latents differ from those of {origin.name} in {name}: {now[name]}, not {before[name]}"
        for name in ("encoder_sha256", "scaling")
        if now[name] != before[name]
    ]


def _listed(names: Sequence[str]) -> str:
    """Names, one for all blocks, with how many they are."""
    counts = Counter(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def _near(pattern: str, model: Backbone) -> str:
    names = [name for name, _ in model.named_parameters()]
    parts = {f"{name.rsplit('.', end)[0]}.*" for name in names for end in range(1, name.count(".") + 1)}
    parts |= set(names) | {f"*.{name.split('.', 2)[2]}" for name in names if name.startswith("blocks.")}
    near = difflib.get_close_matches(pattern, sorted(parts), n=3, cutoff=0.5) or ["blocks.0.*", "*.attn.*", names[-1]]
    return f"did you mean {' or '.join(near)}?"
