"""The launcher and its stages: meta-training, latent extraction, evaluation."""
