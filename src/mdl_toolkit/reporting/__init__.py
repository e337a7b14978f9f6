"""The HTML report and the pictures. (Not `report`: `mdl_toolkit.report` is the function.)

Modules:
    report               `report`: a training, predictions or both to one page
    run_section          the values that the page shows of a training
    evaluation_section   those of predictions, the worst rows first
    audio_links          the addresses of recordings that a page can play
    html                 fill the template in `page/`
    plots                `loss.png` and the confusion matrix
"""
