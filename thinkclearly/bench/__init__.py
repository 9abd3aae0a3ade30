"""How fast the decoder is: the same edits by the reference loop, transformers and ours, in one interleaved run.

loops.py what we are compared with, scripted.py models of any size with random weights, measure.py clocks and ratios,
cases.py what is timed, tables.py the report, run.py the job `thinkclearly bench`.
"""
