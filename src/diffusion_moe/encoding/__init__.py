"""The command `encode`: a data set's images through a VAE into a latent cache."""
