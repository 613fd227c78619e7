"""Configuration: frozen models, and the loader that fills them from YAML, TOML, environment or Python."""

from lmcache_core.config.models import LaneConfig, PipelineConfig, TierConfig

__all__ = ["LaneConfig", "PipelineConfig", "TierConfig"]
