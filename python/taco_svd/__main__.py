"""``python -m taco_svd`` is the command line."""

from .cli import main

main()
