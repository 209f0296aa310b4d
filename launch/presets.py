"""`loss.preset`: what published systems set, by their names. A preset is nothing but settings, and a job's own value wins.

Values are those of the papers, or of the authors' code; where neither says one, the setting is left to the job.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from trainer.errors import InputError

PARAMETERS = "loss.parameters"


@dataclass(frozen=True)
class Preset:
    """Settings by name, each parameter of the objective by itself, and where they come from."""

    source: str
    settings: dict[str, Any]
    note: str = ""  # what the system has beyond them


PRESETS: dict[str, Preset] = {
    "align": Preset(
        "ALIGN, Jia et al. 2021",
        {
            "loss.objective": "label_smoothing",
            "loss.parameters.smoothing": 0.1,
            "loss.symmetric": True,
            "loss.temperature": 1.0,
            "loss.learn_temperature": True,
        },
    ),
    "ance": Preset(
        "ANCE, Xiong et al. 2020",
        {"search.top_k": 200, "sample.method": "uniform", "filter.relative_margin": "off"},
        "the index is rebuilt from each checkpoint",
    ),
    "angle": Preset("AnglE, Li and Li 2023", {"loss.objective": "angle", "loss.temperature": 0.05}, "the angle's part alone"),
    "clip": Preset(
        "CLIP, Radford et al. 2021",
        {
            "loss.symmetric": True,
            "loss.temperature": 0.07,
            "loss.learn_temperature": True,
            "loss.min_temperature": 0.01,
        },
    ),
    "cosent": Preset("CoSENT, Su 2022", {"loss.objective": "cosent", "loss.temperature": 0.05}),
    "dcl": Preset("Decoupled Contrastive Learning, Yeh et al. 2022", {"loss.objective": "dcl", "loss.temperature": 0.1}),
    "debiased": Preset(
        "Debiased Contrastive Learning, Chuang et al. 2020",
        {"loss.objective": "debiased", "loss.parameters.positive_share": 0.1, "loss.temperature": 0.5},
    ),
    "e5": Preset(
        "E5, Wang et al. 2022",
        {"loss.temperature": 0.01, "model.query_prefix": "query: ", "model.passage_prefix": "passage: "},
    ),
    "embeddinggemma": Preset(
        "EmbeddingGemma, Schechter Vera et al. 2025",
        {"loss.parameters.hardness": 5, "loss.parameters.hardness_of": "own"},
        "distillation and several widths come on top",
    ),
    "gte": Preset(
        "GTE, Li et al. 2023",
        {"loss.symmetric": True, "loss.same_side": True, "loss.partition": "joint", "loss.temperature": 0.01},
    ),
    "kalm-v2": Preset("KaLM-Embedding-V2, 2025", {"loss.parameters.focal": 0.5}),
    "llave": Preset("LLaVE, Lan et al. 2025", {"loss.parameters.hardness": 9, "loss.temperature": 0.02}),
    "nv-embed-2": Preset("the second stage of NV-Embed, Lee et al. 2024", {"loss.parameters.in_batch": False}),
    "nv-retriever": Preset(
        "NV-Retriever, Moreira et al. 2024",
        {"filter.relative_margin": 0.05, "filter.positive": "lowest"},
        "TopK-PercPos of the mined negatives",
    ),
    "rzenembed": Preset(
        "RzenEmbed, 2025",
        {"loss.parameters.hardness": 9, "loss.parameters.mean_weight": True, "loss.absolute_margin": -0.1},
        "weights and masks are RzenEmbed's; the numbers are LLaVE's and UniME's",
    ),
    "siglip": Preset(
        "SigLIP, Zhai et al. 2023",
        {
            "loss.objective": "sigmoid",
            "loss.parameters.bias": -10,
            "loss.temperature": 0.1,
            "loss.learn_temperature": True,
        },
    ),
    "simans": Preset("SimANS, Zhou et al. 2022", {"sample.method": "simans", "filter.relative_margin": "off"}),
    "simcse": Preset("SimCSE, Gao et al. 2021, supervised", {"loss.temperature": 0.05}),
    "unime": Preset(
        "UniME, Gu et al. 2025",
        {"loss.absolute_margin": -0.1, "loss.parameters.hardest": 8, "loss.temperature": 0.02},
    ),
}


@dataclass(frozen=True)
class Applied:
    """What a preset has done to a job's table."""

    origins: dict[str, str]  # of each setting that the preset gave, by name: its source
    remarks: list[str]  # what the job says otherwise


def apply_preset(table: dict[str, Any]) -> Applied:
    """Put the settings of a job's preset into its table, where the job says nothing. Raises InputError for an unknown one."""
    name = table.get("loss", {}).get("preset")
    if name is None:
        return Applied({}, [])
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, 1)
        words = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(PRESETS)}"
        raise InputError(f"there is no loss.preset={name!r}; {words}")
    origins, remarks = {}, []
    for setting, value in PRESETS[name].settings.items():
        *path, key = setting.split(".")
        place = table
        for part in path:
            place = place.setdefault(part, {})
        if key not in place:
            place[key] = value
            origins[setting] = f"loss.preset={name}: {PRESETS[name].source}"
        elif place[key] != value:
            remarks.append(f"{setting} is {place[key]!r} here, and {value!r} in loss.preset={name} ({PRESETS[name].source})")
    return Applied(origins, remarks)
