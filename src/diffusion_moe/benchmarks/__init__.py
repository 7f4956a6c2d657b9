"""How fast the layer, a training step and sampling are, held against a plain loop over experts and a dense layer."""
