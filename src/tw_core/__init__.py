"""Reasoning trees: text, trajectories, units, tries, packed rows (torch and numpy alone)."""

__all__: list[str] = []
