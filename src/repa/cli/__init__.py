"""The command line: parse options, run one job, print. Nothing here computes."""
