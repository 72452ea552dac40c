"""Figures of a run, as PNG. Each figure is drawn in memory and written whole, so an existing file is complete."""

from experiments.figures.confusion import draw_confusion
from experiments.figures.latent_map import draw_latent_map
from experiments.figures.learning_curve import draw_learning_curve
from experiments.figures.methods import draw_methods, draw_sheet
from experiments.figures.quality import draw_quality, draw_rate_distortion
from experiments.figures.reconstructions import draw_reconstructions
from experiments.figures.seeds import draw_heat_map, draw_ranking, draw_sweep
from experiments.figures.segmentations import draw_segmentations

__all__ = [
    "draw_confusion", "draw_heat_map", "draw_latent_map", "draw_learning_curve", "draw_methods", "draw_quality",
    "draw_ranking", "draw_rate_distortion", "draw_reconstructions", "draw_segmentations", "draw_sheet", "draw_sweep",
]  # fmt: skip
