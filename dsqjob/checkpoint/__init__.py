"""Bytes of checkpoints: headers, releases, shards. No arithmetic on values."""
