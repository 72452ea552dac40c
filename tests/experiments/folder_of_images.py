"""A config of a folder of images that trains in seconds."""

from configs import base


def get_config():
    config = base.get_config("image_folder", size=16)
    return base.cpu(config, width=16, latent_dim=8, steps=20, batch_size=4, fit_steps=5)
