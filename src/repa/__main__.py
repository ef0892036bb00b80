"""`python -m repa`, which is what torchrun starts: torchrun --nproc-per-node 8 -m repa train ..."""

from repa.cli.main import main

main()
