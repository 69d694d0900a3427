"""The command `relay`: what is installed with the package, on one command line."""
