"""Shardwright trains decoder-only language models under any mix of parallelism, and proves that the mix is right."""

__version__ = "0.1.0"
