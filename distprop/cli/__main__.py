"""`python -m distprop.cli` is the command `distprop`."""

from distprop.cli import main

if __name__ == "__main__":
    main()
