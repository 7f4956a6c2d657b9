"""What a recipe will take, before it is run: parameters, compute, memory, disk and time."""
