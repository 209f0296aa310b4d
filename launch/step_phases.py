"""The phases of a step, as they are measured, planned and shown: one word for each, everywhere.

`data` puts the batch together, `agree` and other small messages are `control`, `idle` is waiting for a slower rank.
"""

OF_LOSS = ("gather", "statistics", "loss", "reduce_scatter")
# In the order in which they come; together they are the whole step.
PHASES = ("data", "encode", *OF_LOSS, "encode_again", "parameters", "optimizer", "control", "idle", "rest")
HIDDEN = "parameters_hidden"  # of the parameters' synchronisation, what runs beside the backward: in no sum
