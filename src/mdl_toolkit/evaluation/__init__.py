"""Comparison of predictions with references.

Modules:
    evaluate       `evaluate`: metrics, intervals, groups, comparison of two systems
    align          predictions aligned with their references, and groups of rows
    answers        references and predictions, and the rules by which they are compared
    metrics        the metrics of a corpus: accuracy, WER, CER, BLEU, chrF, and the table of all
    label_metrics  metrics of labels: macro F1, mAP, counts of confused labels
    text_metrics   metrics of single answers, as sums that add up over rows and processes
    bootstrap      confidence intervals and paired tests
    csv_table      CSVs that are read whole, and the join of two of them
    results        values of an evaluation, and their JSON and CSV
    render         text tables of an evaluation for the terminal
"""
