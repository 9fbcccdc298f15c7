"""AR+: persona-aware Chinese dialogue generation, trained at full scale on Ray.

The road of the data is the layout of the package: record → session → example → batch → loss → state →
checkpoint → reply. ``arplus.model`` imports torch and :mod:`arplus.config` alone; ``arplus.tracking`` is the only
module that imports mlflow; ``jobs/`` holds one thin command a verb.
"""

__version__ = "0.1.0"
