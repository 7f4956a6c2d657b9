"""The command `inspect`: a data set as training would see it."""
