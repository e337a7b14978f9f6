"""From a CSV to batches of tensors.

Modules:
    csv_format       what a file of rows is: encoding, separator, line ends, workbook, JSON, Kaldi's lists
    csv_reader       a CSV file to lines of cells
    json_reader      JSON Lines, chats, manifests and cuts of others to cells by column
    parquet_reader   Parquet files to cells by column
    kaldi            Kaldi's data folders to cells by column
    column_names     which names of columns are read, forgiven or not known
    segment_columns  which columns name a segment and a channel
    manifest         lines to `Row`s; every problem at once
    missing          why a recording is not found, and where it is
    listing          a folder or pattern of recordings as a CSV
    chat_template    a row to messages and spans
    split            training, evaluation and test rows of a CSV, nothing on two sides
    tokenization     spans to `input_ids` and `labels`
    dataset          the converted dataset on disk, and its samples
    concat           several of them as one
    dataset_writer   samples to that dataset
    collate          samples to one batch
    prefetch         batches ahead of time, in threads
    open_audio       rows to clips, addresses fetched ahead
    warnings         what is most likely not meant: leaks, identical answers, long answers
    convert/         `convert-dataset`
    check/           `check`
"""
