"""What a model can do with pictures, skill by skill, on held-out pictures that are drawn here.

Read in this order: `bars.py` (what is measured, and what is asked for), `items.py` (the pictures and questions),
`grading.py` (an answer against the truth), `scoring.py` (scores with intervals, beside what needs no looking),
`report.py` (table and pictures), `command.py`.
"""
