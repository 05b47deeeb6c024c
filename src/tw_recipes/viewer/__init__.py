"""Trajectories to look at: self-contained HTML."""

from tw_recipes.viewer.html import page, trajectory_html

__all__ = ["page", "trajectory_html"]
