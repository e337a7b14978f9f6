"""`python -m mdl_toolkit`, the same as the command `mdl-toolkit`."""

from mdl_toolkit.cli.main import main

if __name__ == "__main__":
    main()
