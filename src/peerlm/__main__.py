"""`python -m peerlm` is the command `peerlm`."""

from peerlm.cli import main

main()
