"""`check`: a dry run over CSVs.

Modules:
    run        the command
    rows       what is noted of each row, in a worker process
    copies     recordings at another level or rate
    findings   these added up: lengths, duplicates, leaks
    text       the findings in words
"""
