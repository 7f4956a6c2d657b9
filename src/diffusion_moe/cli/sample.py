"""The verbs that generate images from a folder: `sample` and `analyze`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..sampling.options import SampleOptions
from .folder import read_folder
from .output import log


def sample(arguments: Sequence[str]) -> int:
    """Generate images from a run, a converted folder or a pipeline folder; settings default to the run's recipe."""
    source, options, settings = read_folder(sample, arguments, SampleOptions, {"num_samples"})
    from ..sampling.generate import with_precision
    from ..sampling.sample import generate_images

    source = dataclasses.replace(source.with_vae(options.vae), weights=options.weights)
    with_precision(settings, log)
    log(f"wrote {generate_images(source, settings, options, log)}")
    return 0


def analyze(arguments: Sequence[str]) -> int:
    """Record the routers while sampling, and write report.html with figures and data; settings default to the run's."""
    from ..analysis.options import AnalyzeOptions

    hidden = {"acceleration"}  # it would hide the routers
    usual = {"num_samples": 100, "steps": 20}
    source, options, settings = read_folder(analyze, arguments, AnalyzeOptions, hidden, usual)
    from ..analysis.run import analyze as write_report
    from ..sampling.generate import with_precision

    settings = with_precision(settings, log)
    log(f"wrote {write_report(source, settings, options, log)}")
    return 0
