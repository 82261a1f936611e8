"""A model shows what it sees, and a miniature learns to see.

Read in this order: `questions.py` (twelve pictures of different kinds, and what is asked), `command.py` (who asks it),
`answers.py` (what people look at), `training.py` (a miniature learns, and answers other questions).
"""
