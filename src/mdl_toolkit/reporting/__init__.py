"""The HTML report and the pictures. (Not `report`: `mdl_toolkit.report` is the function.)

Modules:
    report               `report`: a training, predictions or both to one page
    run_section          what the page shows of a training
    evaluation_section   what it shows of predictions, the worst first
    audio_links          recordings to addresses that a page can play
    html                 fill the template in `page/`
    plots                `loss.png` and the confusion matrix
"""
