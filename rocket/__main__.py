"""``python -m rocket``, which is what torchrun starts: ``torchrun --nproc-per-node 2 -m rocket run``."""

from rocket.scripts.main import main

main()
