"""The same work on Shardwright and on its peers, side by side, interleaved in one run."""
