"""`python -m mdl_toolkit`, the same as the command `mdl-toolkit`."""

import sys


def main() -> None:
    """Run the command line; an interruption while our modules are imported is one line too."""
    try:
        from mdl_toolkit.cli.main import main as run_and_exit
    except KeyboardInterrupt:
        from mdl_toolkit.i18n import Localized

        message = Localized("interrupted")
        sys.stderr.write(f"{message}\n")
        sys.exit(130)
    run_and_exit()


if __name__ == "__main__":
    main()
