"""The job file: what may stand in it, how it is read, what is written down of it."""

from concertina.config.load import ReadJob, load_job, read_job
from concertina.config.parameters import Parameters, count_parameters
from concertina.config.resolved import digest, dump_job
from concertina.config.schema import (
    AnomalyConfig,
    CapacityConfig,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    ElasticConfig,
    Job,
    LayoutConfig,
    ModelConfig,
    Precision,
    RopeScalingConfig,
    SourceConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainingConfig,
)
from concertina.config.tree import Problem

__all__ = [
    "AnomalyConfig",
    "CapacityConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "ElasticConfig",
    "Job",
    "LayoutConfig",
    "ModelConfig",
    "Parameters",
    "Precision",
    "Problem",
    "ReadJob",
    "RopeScalingConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainingConfig",
    "count_parameters",
    "digest",
    "dump_job",
    "load_job",
    "read_job",
]
