"""One checkpoint written and waited for."""

from diffusion_moe.storage import AsyncWriter


def write(folder, step, tensors, metadata, **options):
    """Its path; all processes call this together, and every older checkpoint is kept."""
    with AsyncWriter(folder, keep=10**6, **options) as writer:
        writer.save(step, tensors, metadata)
        return writer.wait()
