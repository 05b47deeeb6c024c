"""Settings of every test: Hypothesis judges results, not the speed of a busy machine."""

from hypothesis import settings

settings.register_profile("threadweaver", deadline=None)
settings.load_profile("threadweaver")
