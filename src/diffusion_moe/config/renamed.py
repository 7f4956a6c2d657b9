"""Settings that had other names in the version before this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "model.num_groups": "model.n_group",
    "model.top_groups": "model.topk_group",
    "model.routed_scale": "model.routed_scaling_factor",
    "model.interleave": "model.moe_layer_freq",
    "model.skip_first": "model.first_k_dense",
    "training.more_ema_decays": "training.extra_ema_decays",
    "training.max_bad_steps": "training.max_nonfinite_steps",
    "start": "init",
    "start.source": "init.from_checkpoint",
}
"""New names by old ones."""


def new_name(name: str) -> str | None:
    """The name now of a setting, a section or an option (with its dashes), with a note; None unless it was renamed."""
    dashes, old = ("--", name[2:]) if name.startswith("--") else ("", name)
    new = RENAMED.get(old)
    if new is None and old.startswith("start."):
        new = f"init.{old.removeprefix('start.')}"
    note = " (true is now 2, false is now 1)" if old == "model.interleave" else ""
    return None if new is None else f"{dashes}{new}{note}"


def old_names(settings: Mapping[str, Any]) -> list[str]:
    """Settings of a model by their old names, each with its new one."""
    renamed = [(old.removeprefix("model."), new.removeprefix("model.")) for old, new in RENAMED.items()]
    return [f"{old} (now {new})" for old, new in renamed if old in settings]


def current_names(settings: Mapping[str, Any], section: str = "model") -> dict[str, Any]:
    """A section's values, or a saved model's config, that the version before may have written, under today's names."""
    current = {}
    for key, value in settings.items():
        name = RENAMED.get(f"{section}.{key}", f"{section}.{key}")
        if name == "model.moe_layer_freq" and isinstance(value, bool):
            value = 2 if value else 1
        current[name.partition(".")[2]] = value
    return current


def current_sections(sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's sections that the version before may have written, under today's names."""
    return {
        RENAMED.get(section, section): current_names(fields, section) if isinstance(fields, Mapping) else fields
        for section, fields in sections.items()
    }
