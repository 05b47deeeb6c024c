"""Train, run, reward, generate data for, measure and show fork/join reasoning."""

__all__: list[str] = []
