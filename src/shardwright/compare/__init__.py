"""`shardwright compare`: one recipe under every technique, measured one after the other on this machine."""
