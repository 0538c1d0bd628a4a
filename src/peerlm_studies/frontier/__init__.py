"""The frontier: what loss costs in bytes read per token, in seconds, in memory and in FLOPs, over rows of any study."""
