"""How a model is used: what the job says, what its folder says, and the defaults, in this order."""

import functools
import logging
from dataclasses import asdict, fields, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.encoder.backbone import UNLIMITED, is_causal, max_positions
from trainer.encoder.pooling import POOLINGS, pooling_of
from trainer.encoder.prompts import warn_without_prompts
from trainer.encoder.recorded import Recorded
from trainer.encoder.settings import ModelSettings, Traits
from trainer.encoder.tokenizer import append_eos, check_belongs
from trainer.errors import InputError

log = logging.getLogger(__name__)

USUAL_TOKENS = 512  # of a text where neither the model nor its tokenizer has a limit
LENGTHS = ("max_query_tokens", "max_passage_tokens")


def settle_traits(
    recorded: Recorded, settings: ModelSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Traits:
    """Return the traits of a model whose weights are not looked at, and let its tokenizer end texts as they ask for."""
    check_belongs(tokenizer, model, settings.name)
    traits = _joined(recorded.traits, settings, model, tokenizer)
    ends_new_pooling = traits.pooling == "last" and "pooling" not in recorded.traits and tokenizer.eos_token is not None
    if ends_new_pooling if settings.append_eos is None else settings.append_eos:
        append_eos(tokenizer)
    warn_without_prompts(settings.name, recorded.source, traits)
    return traits


def settle_width(traits: Traits, settings: ModelSettings, whole_width: int) -> Traits:
    """Return the traits with a width that cuts something off, or none; raises InputError for a job's that is too large."""
    if settings.width is not None and settings.width > whole_width:
        raise InputError(
            f"model.width={settings.width}, but embeddings of {settings.name} have {whole_width} numbers; set it lower"
        )
    return replace(traits, width=None) if traits.width is not None and traits.width >= whole_width else traits


def _joined(recorded: dict, settings: ModelSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Traits:
    longest = max_positions(model)
    usual = min(longest, int(tokenizer.model_max_length))
    usual = usual if usual < UNLIMITED else USUAL_TOKENS
    default = Traits(
        pooling="last" if is_causal(model) else "mean",
        normalize=True,
        query_prefix="",
        passage_prefix="",
        max_query_tokens=usual,
        max_passage_tokens=usual,
    )
    of_traits = {trait.name for trait in fields(Traits)}
    chosen = {key: value for key, value in asdict(settings).items() if key in of_traits and value is not None}
    traits = replace(default, **{**recorded, **chosen})
    for name in LENGTHS:
        tokens = getattr(traits, name)
        if tokens > longest and name not in chosen:
            _say_once(f"{settings.name} records texts of {tokens} tokens, and has positions for {longest}: they are cut there")
            traits = replace(traits, **{name: longest})  # type: ignore[arg-type]
        elif not 3 <= tokens <= longest:
            raise InputError(f"model.{name}={tokens} is not between 3 and {longest}, the longest text that {settings.name} takes")
    return _checked_pooling(traits, settings)


def _checked_pooling(traits: Traits, settings: ModelSettings) -> Traits:
    if traits.pooling != "latent" and pooling_of(traits.pooling) is None:
        raise InputError(f"model.pooling={traits.pooling!r} is unknown; expected one of {', '.join((*POOLINGS, 'latent'))}")
    if not traits.include_prompt and traits.pooling == "latent":
        raise InputError(f"{settings.name} leaves prompts out of its pooling, which latent pooling cannot; set model.pooling")
    if traits.width is not None and traits.width < 1:
        raise InputError(f"{settings.name} records a width of {traits.width}, expected 1 or more; set model.width")
    return traits


@functools.cache
def _say_once(sentence: str) -> None:
    log.warning(sentence)
