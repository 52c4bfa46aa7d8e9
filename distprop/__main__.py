"""`python -m distprop` is the command `distprop`; `distprop run -n 2 -m distprop train ...` runs it on two ranks."""

from distprop.cli import main

if __name__ == "__main__":
    main(prog_name="distprop")
