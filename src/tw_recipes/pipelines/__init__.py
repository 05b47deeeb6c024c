"""Whole runs as Python functions, each with a command of the same name: `quickstart`."""
