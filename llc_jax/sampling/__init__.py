"""Chains: the posterior that they sample, one chain as a scan, many as one program."""
