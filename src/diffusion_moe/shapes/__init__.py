"""The toy world: scenes of coloured shapes with captions, a scorer for images of them, and a text encoder."""
