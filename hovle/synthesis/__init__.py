"""Training and test pictures that are drawn here, with questions, answers and what stands where in them.

A skill draws a sample by its number: `draw(index, split, seed)` depends on its arguments and on the fetched assets
alone, so shards can be made in any order, in parallel, and again after a kill, byte for byte.

Read in this order: `samples.py` (what is drawn), `skill.py` (what draws it), `skills/reading.py` (one that does),
`shards.py` (how it is stored), `building.py` (who does the work), `card.py` and `sheets.py` (what people look at).
"""
