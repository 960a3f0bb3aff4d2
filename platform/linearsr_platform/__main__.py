"""`python -m linearsr_platform`: the command line where its console script is not on the path, as in a cluster's job."""

from linearsr_platform.cli.app import main

main()
