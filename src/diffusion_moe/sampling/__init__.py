"""Images from a run, a pipeline folder, a model's folder or a model in memory."""
