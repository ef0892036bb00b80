"""The front door: parse, call one job, print. Nothing here computes."""
