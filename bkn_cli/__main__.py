"""`python -m bkn_cli`."""

from bkn_cli.start import main

main()
