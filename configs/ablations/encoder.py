"""The diffusion autoencoder, or a diffusion model alone: with an empty latent there is no encoder."""


def get_variants(base):
    return {"encoder": {}, "none": {"model.z_dim": 0, "model.stochastic_encoding": False}}
