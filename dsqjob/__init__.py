"""dsqjob: DeepSeek releases become NVFP4 checkpoints, as resumable multi-node jobs."""

__version__ = "0.1.0"
