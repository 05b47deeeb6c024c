"""Attention over packed tries: forward and backward, several implementations, one meaning."""

__all__: list[str] = []
