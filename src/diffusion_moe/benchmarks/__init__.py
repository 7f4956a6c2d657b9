"""Time, memory and operators of the MoE layer, a training step, sampling and the experts' matmuls."""
