"""Predictions for recordings, row by row.

Modules:
    run            `infer`: check, convert, answer, write the CSV
    requests       the rows to answer, each with its token budget
    engines        greedy, sampling, beams, choices, vLLM or a server, as the options say
    windows        long recordings in windows, and the join of their answers
    generate       prompts to answers: continuous batching over one key-value store
    beam_search    transformers' beam search, over prompts of one length
    choices        the most likely of given texts
    vllm_engine    vLLM in this process
    server_engine  an OpenAI-compatible server
    journal        finished answers on disk, from which a killed run goes on
    output         the CSV or workbook of the answers, or subtitles
    verify         whether a merged model answers as base and adapter do
"""
