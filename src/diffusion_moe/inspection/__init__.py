"""The command `inspect`: what training would see of a data set."""
