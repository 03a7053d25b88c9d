"""`python -m fluffle` is the command `fluffle`."""

from fluffle.cli import main

main()
