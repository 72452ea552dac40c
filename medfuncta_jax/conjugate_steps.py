"""Conjugate-gradient steps on latents, for fits whose curvatures differ too much for gradient steps.

A step goes along d = -g + beta d', where g is the gradient, d' the direction of the step before, and beta that of Polak
and Ribiere, never negative (Nocedal and Wright 2006, section 5.2). Its length is that of the quadratic model along d,
-(g^T d) / |d^T H d|. H d is one forward derivative of the gradient; the absolute value keeps the step downhill where
the curvature is negative (Dauphin et al. 2014). A step that raises a signal's objective is taken back, and half of it
tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class _Best(NamedTuple):
    """The best latents so far and their objective, gradient and direction, and the step to try from them."""

    latents: jax.Array  # [B, P], as the next two and the last
    gradient: jax.Array
    direction: jax.Array
    objective: jax.Array  # [B, 1]
    step: jax.Array


def conjugate_steps(
    gradient_at: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    start: jax.Array,
    *,
    penalty: jax.Array,
    steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Minimise losses plus `penalty` |phi|^2 of B latents at once.

    Args:
      gradient_at: latents [B, P] to the gradients [B, P] of their losses and the losses [B]; each row on its own.
      start: [B, P].
      penalty: [B], at least 0.
      steps: at least 1. Each costs a gradient and a forward derivative of one.
    Returns:
      The best latents [B, P], and the losses [B, steps] of the latents that each step evaluated, without the penalty;
      those that were taken back are among them.
    """
    penalty = penalty[:, None]

    def objective_at(latents: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        gradient, losses = gradient_at(latents)
        return gradient + 2 * penalty * latents, losses[:, None] + penalty * _dot(latents, latents), losses

    def better(latents: jax.Array, best: _Best) -> tuple[_Best, jax.Array]:
        gradient, objective, losses = objective_at(latents)
        accepted = objective <= best.objective  # False for NaN
        size = _dot(best.gradient, best.gradient)
        beta = jnp.maximum(_ratio(_dot(gradient, gradient - best.gradient), size), 0)
        direction = beta * best.direction - gradient
        direction = jnp.where(_dot(direction, gradient) < 0, direction, -gradient)
        new = _Best(latents, gradient, direction, objective, jnp.zeros_like(latents))
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, best._replace(step=best.step / 2)), losses

    def step(carry: tuple[_Best, jax.Array], _: None) -> tuple[tuple[_Best, jax.Array], jax.Array]:
        best, latents = carry
        best, losses = better(latents, best)
        curved = jax.jvp(lambda at: objective_at(at)[0], (best.latents,), (best.direction,))[1]
        length = _ratio(-_dot(best.gradient, best.direction), jnp.abs(_dot(best.direction, curved)))
        full = length * best.direction
        # A step of zero is one that was not tried yet.
        best = best._replace(step=jnp.where(_dot(best.step, best.step) > 0, best.step, full))
        return (best, best.latents + best.step), losses

    zeros = jnp.zeros_like(start)
    first = _Best(start, zeros, zeros, jnp.full((len(start), 1), jnp.inf, start.dtype), zeros)
    (best, latents), losses = jax.lax.scan(step, (first, start), length=steps)
    return better(latents, best)[0].latents, losses.T


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(-1, keepdims=True)


def _ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    """above / below, and 0 where below is 0; with a derivative that is finite at any scale."""
    there = below != 0
    # The derivative of a quotient has the square of its divisor, which a scale keeps from underflow.
    scale = jax.lax.stop_gradient(jnp.where(there, jnp.abs(below), 1))
    return jnp.where(there, (above / scale) / jnp.where(there, below / scale, 1), 0)
