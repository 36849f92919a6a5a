"""The masked softmax, and masks with their algebra."""

from collections.abc import Callable

import jax
from einops import rearrange

from jattn.functional import masks, scores
from jattn.functional.softmax import masked_softmax
from jattn.parity.system import Arguments, Arrays, System, attend_single_head

Array = jax.Array


def softmax(_module: None, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """Under the mask or the lengths of the fixture."""
    return {
        "weights": masked_softmax(
            inputs["scores"], inputs.get("mask"), lengths=inputs.get("lengths")
        )
    }


def mask_of(arguments: Arguments, inputs: Arrays) -> masks.Mask:
    """The mask that a fixture names."""
    causal = masks.causal(arguments.get("offset", 0))
    window = masks.sliding_window(arguments.get("left", 0), arguments.get("right", 0))
    makers: dict[str, Callable[[], masks.Mask]] = {
        "causal": lambda: causal,
        "sliding_window": lambda: window,
        "no_self": masks.no_self,
        "padding": lambda: masks.padding(inputs["lengths"]),
        "prefix_lm": lambda: masks.prefix_lm(inputs["lengths"]),
        "segments": lambda: masks.segments(inputs["query_ids"], inputs["key_ids"]),
        "dense": lambda: masks.from_array(rearrange(inputs["dense"], "b t s -> b 1 t s")),
        "causal & padding": lambda: causal & masks.padding(inputs["lengths"]),
        "~window | causal & ~no_self": lambda: ~window | causal & masks.no_self(),
    }
    return makers[arguments["mask"]]()


def masked(_module: None, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """Scaled dot-product attention under a mask."""
    return attend_single_head(inputs, mask_of(arguments, inputs), scores.scaled_dot_product)


SYSTEMS = (
    System(
        "masks/masked_softmax",
        4,
        "masked softmax",
        functions=("jattn.masked_softmax",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="masks.MaskedSoftmax",
        call=softmax,
        note="a row with nothing to see is zeros; code that fills with −1e6 makes it uniform",
    ),
    System(
        "masks/mask_algebra",
        8,
        "masks and their algebra",
        functions=(
            "jattn.masks.padding",
            "jattn.masks.causal",
            "jattn.masks.no_self",
            "jattn.masks.segments",
            "jattn.masks.prefix_lm",
            "jattn.masks.sliding_window",
            "jattn.masks.from_array",
        ),
        paper="Dong et al. 2024",
        link="https://arxiv.org/abs/2412.05496",
        reference="masks.MaskedAttention",
        call=masked,
        note="combined with `&`, `|` and `~`",
    ),
)
