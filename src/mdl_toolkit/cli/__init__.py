"""The command line: `mdl-toolkit COMMAND ...`.

Modules:
    main            run a command; turn what went wrong into one line and an exit status
    click_options   turn an options dataclass into a click command
    help            lay out the page of `--help`
"""
