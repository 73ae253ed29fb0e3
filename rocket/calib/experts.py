"""Experts see only the tokens that are routed to them; what too few do not tell of one, those of its siblings do."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from rocket.models import Batch, LinearLayer, block_of, features_of
from rocket.models.inputs import is_padded, without_padding

TOKENS_A_FEATURE = 4

logger = logging.getLogger(__name__)


def fill_experts(
    layers: Mapping[str, LinearLayer],
    blocks: Sequence[str],
    inputs: dict[str, str],
    grams: dict[str, Tensor],
    tokens: dict[str, int],
) -> dict[str, int]:
    """Complete what calibration knows of experts by what it knows of their siblings, in place.

    Returns the tokens that those saw which were completed.

    Arguments are as in `Calibration`. An expert with fewer than `TOKENS_A_FEATURE` tokens for each of its input
    features is filled up to so many by the mean Gram of all experts of its list, each token counted once. The
    eigenvalues of a Gram of n tokens are off by factors of (1 ± √(in/n))², so at 4 tokens a feature none is less than a
    quarter of what it should be.
    """
    seen = {name: tokens[leader] for name, leader in inputs.items()}
    short: dict[str, int] = {}
    for experts in expert_lists(layers, seen, blocks):
        example = next(name for name in experts if name in seen)
        head, number, tail = split_number(inputs[example], blocks)
        if inputs[example] != example and number == split_number(example, blocks)[1]:
            for name in experts:  # they read what another layer of the same expert reads
                inputs.setdefault(name, f"{head}{split_number(name, blocks)[1]}{tail}")
            continue
        wanted = TOKENS_A_FEATURE * features_of(layers[example])[1]
        means = {name: grams[inputs[name]] for name in experts if name in seen}
        for name, gram in fill_up(means, seen, experts, wanted).items():
            inputs[name], grams[name] = name, gram
            tokens[name] = short[name] = seen.get(name, 0)
    return short


def warn_of(short: Mapping[str, int]) -> None:
    """Say which experts were completed (`fill_experts`), if any were."""
    if not short:
        return
    fewest = min(short, key=lambda name: short[name])
    logger.warning(
        "%d inputs of experts saw fewer than %d calibration tokens a feature (the fewest: %s, %d) and are "
        "calibrated on their siblings' tokens too; more calibration data may help",
        len(short),
        TOKENS_A_FEATURE,
        fewest,
        short[fewest],
    )


def unpadded(model: nn.Module, layers: Iterable[str], batches: Iterable[Batch]) -> list[Batch]:
    """The batches; for models with experts, which do not tell what is padding, each text by itself, as long as it is.

    Where inputs do not tell what belongs to which text, padding stays, and a warning says so.
    """
    batches = list(batches)
    if not any("expert" in name for name in layers):
        return batches
    parts = [part for batch in batches for part in without_padding(model, batch)]
    padded = sum(is_padded(part) for part in parts)
    if padded:
        logger.warning("experts are calibrated on the padding of %d batches, too; give them one text a batch", padded)
    return parts


def expert_lists(
    layers: Mapping[str, LinearLayer], tokens: Mapping[str, int], blocks: Sequence[str]
) -> list[list[str]]:
    """The layers that are experts, each with its siblings: they differ in one number below their block.

    ``tokens`` are those that each layer saw, 0 where it has no entry. Layers of a list that saw equally many are no
    experts: nothing was routed. Neither are those of a list that saw none.
    """
    lists: dict[object, list[str]] = {}
    for name, layer in layers.items():
        head, number, tail = split_number(name, blocks)
        if number:
            lists.setdefault((head, tail, features_of(layer)), []).append(name)
    return [names for names in lists.values() if len({tokens.get(name, 0) for name in names}) > 1]


def split_number(name: str, blocks: Sequence[str]) -> tuple[str, str, str]:
    """A layer's name before, at and after the last number below its block; the number is empty if there is none.

    >>> split_number("layers.0.mlp.experts.7.down_proj", ["layers.0"])
    ('layers.0.mlp.experts.', '7', '.down_proj')
    """
    start = len(block_of(name, blocks))
    numbers = list(re.compile(r"(?<=\.|_)\d+(?=\.|$)").finditer(name, start))
    if not numbers:
        return name, "", ""
    return name[: numbers[-1].start()], numbers[-1][0], name[numbers[-1].end() :]


def fill_up(
    means: Mapping[str, Tensor], tokens: Mapping[str, int], experts: Sequence[str], wanted: int
) -> dict[str, Tensor]:
    """New means for those experts that saw fewer tokens than wanted, filled up to so many by the mean of all of them.

    ``means`` are over the tokens of each expert; those without any need no entry.
    """
    seen = {name: tokens[name] for name in experts if tokens.get(name)}
    overall = sum((count * means[name] for name, count in seen.items()), 0.0 * means[next(iter(seen))])
    overall = overall / sum(seen.values())
    filled = {}
    for name in experts:
        count = seen.get(name, 0)
        if count < wanted:
            own = count * means[name] if count else 0.0
            filled[name] = (own + (wanted - count) * overall) / wanted
    return filled


def fill_up_sums(
    sums: Mapping[str, Tensor], tokens: Mapping[str, int], experts: Sequence[str], wanted: int, seen: Mapping[str, int]
) -> dict[str, Tensor]:
    """`fill_up` for sums over the tokens of each expert, which shrink with the number of tokens that it gets.

    What is filled up is the mean over tokens. The number that it is multiplied by is taken from ``seen``, the tokens
    that each expert saw in a pass of whatever length, as few tokens tell little of it; one that saw none counts as
    one that saw one, for it may see some yet.
    """
    means = {name: sums[name] / tokens[name] for name in experts if tokens.get(name)}
    share = sum(tokens.get(name, 0) for name in experts) / sum(seen[name] for name in experts)
    filled = fill_up(means, tokens, experts, wanted)
    return {name: share * max(seen[name], 1) * mean for name, mean in filled.items()}
