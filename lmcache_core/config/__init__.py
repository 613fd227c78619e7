"""Configuration: frozen models, and `load`, which fills them from YAML, TOML, environment or Python."""

from lmcache_core.config.loader import DEFAULT_CONFIG, Loaded, load, named_plugins
from lmcache_core.config.models import LaneConfig, PipelineConfig, RecomputeConfig, TenancyConfig, TierConfig

__all__ = [
    "DEFAULT_CONFIG",
    "LaneConfig",
    "Loaded",
    "PipelineConfig",
    "RecomputeConfig",
    "TenancyConfig",
    "TierConfig",
    "load",
    "named_plugins",
]
