"""The phases of a step, as they are measured, planned and shown: one word for each, everywhere.

`data` puts the batch together, `agree` and other small messages are `control`, `idle` is waiting for a slower rank.
"""

OF_LOSS = ("gather", "statistics", "loss", "reduce_scatter")
REST = "rest"
# In the order in which they come; together they are the whole step.
PHASES = ("data", "encode", *OF_LOSS, "encode_again", "parameters", "optimizer", "control", "idle", REST)
HIDDEN = "parameters_hidden"  # of the parameters' synchronisation, what runs beside the backward: in no sum
# Of the trainer's and gradcache's spans; what has another name is of the rest.
OF_SPANS = {
    "batch": "data",
    "encode": "encode",
    "agree": "control",
    "loss": "loss",
    "gather": "gather",
    "masks": "loss",
    "statistics": "statistics",
    "reduce_scatter": "reduce_scatter",
    "control": "control",
    "backward": "encode_again",
    "update": "optimizer",
}
