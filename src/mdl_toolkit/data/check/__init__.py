"""`check`: a dry run over CSVs.

Modules:
    run        the command
    rows       what is noted of each row, in a worker process
    copies     recordings at another level or rate
    findings   these added up: lengths, duplicates, leaks
    fixed      the CSV of what can be used, long rows in parts
    text       the findings in words
"""
