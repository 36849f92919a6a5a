"""The one table of the systems: row → function, module, paper, PyTorch reference, weight rules."""

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from jattn import nn
from jattn.functional import scores
from jattn.interop import torch_layouts as layouts
from jattn.interop.rules import Rule
from jattn.parity import ports


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the table.

    Args:
      row: its number.
      title: what it is.
      functions: public names of the pure functions that compute it.
      modules: public names of the Flax modules that own its parameters; none for a pure function.
      paper: authors and year.
      link: where the paper is.
      reference: name of the PyTorch reference in `experiments.torch_reference`; never imported here.
      build: a fixture's arguments and a parameter type → the module.
      call: module, inputs and arguments → outputs by name.
      rules: how its weights travel.
      note: what a reader of the table should know.

    Example:
      >>> SYSTEMS[5].title, SYSTEMS[5].modules
      ('additive attention', ('jattn.nn.AdditiveAttention',))
    """

    row: int
    title: str
    functions: tuple[str, ...]
    paper: str
    link: str
    reference: str
    call: ports.Call
    build: ports.Build = ports.no_module
    modules: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    note: str = ""


_ROWS = (
    System(
        1,
        "average pooling",
        functions=("jattn.attend", "jattn.scores.constant"),
        paper="Nadaraya 1964",
        link="https://doi.org/10.1137/1109020",
        reference="pooling.AveragePooling",
        call=ports.pool_with(scores.constant),
    ),
    System(
        2,
        "Nadaraya-Watson kernel regression",
        functions=("jattn.attend", "jattn.scores.gaussian"),
        paper="Nadaraya 1964",
        link="https://doi.org/10.1137/1109020",
        reference="pooling.KernelRegression",
        call=ports.pool_with(scores.gaussian),
    ),
    System(
        3,
        "Nadaraya-Watson kernel regression, parametric",
        functions=("jattn.attend", "jattn.scores.gaussian"),
        modules=("jattn.nn.NadarayaWatson",),
        paper="Watson 1964",
        link="https://www.jstor.org/stable/25049340",
        reference="pooling.ParametricKernelRegression",
        build=ports.kernel_regression_module,
        call=ports.pool,
        rules=(Rule("w", "weight"),),
    ),
    System(
        4,
        "masked softmax",
        functions=("jattn.masked_softmax",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="pooling.MaskedSoftmax",
        call=ports.softmax,
        note="a row with nothing to see is zeros; code that fills with −1e6 makes it uniform",
    ),
    System(
        5,
        "additive attention",
        functions=("jattn.scores.additive",),
        modules=("jattn.nn.AdditiveAttention",),
        paper="Bahdanau et al. 2015",
        link="https://arxiv.org/abs/1409.0473",
        reference="pooling.AdditiveAttention",
        build=ports.constructor(nn.AdditiveAttention),
        call=ports.pool,
        rules=layouts.ADDITIVE_ATTENTION,
    ),
    System(
        6,
        "scaled dot-product attention",
        functions=("jattn.attend", "jattn.dot_product_attention"),
        modules=("jattn.nn.DotProductAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="pooling.DotProductAttention",
        build=ports.without_parameters(nn.DotProductAttention),
        call=ports.pool,
    ),
    System(
        7,
        "dot-product, bilinear and cosine scores",
        functions=("jattn.scores.dot_product", "jattn.scores.bilinear", "jattn.scores.cosine"),
        modules=("jattn.nn.DotProductAttention", "jattn.nn.BilinearAttention", "jattn.nn.CosineAttention"),
        paper="Luong et al. 2015",
        link="https://arxiv.org/abs/1508.04025",
        reference="pooling.scored_attention",
        build=ports.scored_module,
        call=ports.pool,
        rules=(Rule("W", "weight"),),
    ),
    System(
        8,
        "masks and their algebra",
        functions=(
            "jattn.masks.padding",
            "jattn.masks.causal",
            "jattn.masks.no_self",
            "jattn.masks.segments",
            "jattn.masks.prefix_lm",
            "jattn.masks.sliding_window",
            "jattn.masks.dense",
        ),
        paper="Dong et al. 2024",
        link="https://arxiv.org/abs/2412.05496",
        reference="pooling.MaskedAttention",
        call=ports.masked,
        note="combined with `&`, `|` and `~`",
    ),
    System(
        9,
        "head split and merge",
        functions=(
            "jattn.heads.split_heads",
            "jattn.heads.merge_heads",
            "jattn.heads.fold_heads",
            "jattn.heads.unfold_heads",
            "jattn.heads.repeat_lengths",
        ),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="multi_head.HeadSplit",
        call=ports.split_and_merge,
    ),
    System(
        10,
        "multi-head attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="multi_head.MultiHeadAttention",
        build=ports.constructor(nn.MultiHeadAttention),
        call=ports.multi_head,
        rules=layouts.MULTI_HEAD_ATTENTION,
    ),
    System(
        15,
        "grouped-query attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Ainslie et al. 2023",
        link="https://arxiv.org/abs/2305.13245",
        reference="multi_head.MultiHeadAttention",
        build=ports.constructor(nn.MultiHeadAttention),
        call=ports.multi_head,
        rules=layouts.MULTI_HEAD_ATTENTION,
        note="`num_kv_heads=K`",
    ),
    System(
        16,
        "multi-query attention",
        functions=("jattn.attend",),
        modules=("jattn.nn.MultiHeadAttention",),
        paper="Shazeer 2019",
        link="https://arxiv.org/abs/1911.02150",
        reference="multi_head.MultiHeadAttention",
        build=ports.constructor(nn.MultiHeadAttention),
        call=ports.multi_head,
        rules=layouts.MULTI_HEAD_ATTENTION,
        note="`num_kv_heads=1`",
    ),
    System(
        19,
        "sinusoidal positions",
        functions=("jattn.positions.sinusoidal_encoding",),
        modules=("jattn.nn.SinusoidalPositions",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="positions.SinusoidalPositions",
        build=ports.without_parameters(nn.SinusoidalPositions),
        call=ports.add_positions,
    ),
    System(
        20,
        "relative property of sinusoidal positions",
        functions=("jattn.positions.sinusoidal_rotation",),
        paper="Vaswani et al. 2017",
        link="https://arxiv.org/abs/1706.03762",
        reference="positions.RelativeRotation",
        call=ports.rotate,
    ),
    System(
        21,
        "learned absolute positions",
        functions=(),
        modules=("jattn.nn.LearnedPositions",),
        paper="Gehring et al. 2017",
        link="https://arxiv.org/abs/1705.03122",
        reference="positions.LearnedPositions",
        build=ports.constructor(nn.LearnedPositions),
        call=ports.add_positions,
        rules=(Rule("table.weight", "embedding"),),
    ),
    System(
        24,
        "gated recurrent unit",
        functions=("jattn.nn.recurrent.gru_step",),
        modules=("jattn.nn.GRU", "jattn.nn.GRUCell"),
        paper="Cho et al. 2014",
        link="https://arxiv.org/abs/1406.1078",
        reference="recurrent.recurrent",
        build=ports.recurrent_module,
        call=ports.recur,
        rules=layouts.within(layouts.GRU, "rnn") + layouts.within(layouts.GRU_CELL, "cell"),
        note="not yet the row's RNN, LSTM, both directions and projections",
    ),
    System(
        31,
        "Bahdanau encoder-decoder",
        functions=(),
        modules=("jattn.models.Seq2Seq",),
        paper="Bahdanau et al. 2015",
        link="https://arxiv.org/abs/1409.0473",
        reference="recurrent.Seq2Seq",
        build=ports.seq2seq_module,
        call=ports.translate,
        rules=layouts.SEQ2SEQ,
    ),
)

SYSTEMS: Mapping[int, System] = MappingProxyType({system.row: system for system in _ROWS})
"""Row number → system."""


def markdown(titles: Iterable[str] = ()) -> str:
    """The table for a README: row → functions → module → paper → fixtures.

    Args:
      titles: titles of the fixtures, as `Fixture.title` gives them (`"5/additive"`).

    Returns:
      A Markdown table, one line for each system, in the order of the rows.

    Example:
      >>> print(markdown(["4/masked_softmax"]).splitlines()[5])
      | 4 | masked softmax (a row with nothing to see is zeros; code that fills with −1e6 makes it uniform) \
| `masked_softmax` |  | [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762) | `masked_softmax` |
    """
    cases: dict[int, list[str]] = {}
    for title in titles:
        number, case = title.split("/", 1)
        cases.setdefault(int(number), []).append(case)

    def code(names: Iterable[str]) -> str:
        return ", ".join(f"`{name.removeprefix('jattn.')}`" for name in names)

    lines = ["| row | system | function | module | paper | proven by |", "| ---: | --- | --- | --- | --- | --- |"]
    for row, system in SYSTEMS.items():
        described = f"{system.title} ({system.note})" if system.note else system.title
        paper = f"[{system.paper}]({system.link})"
        cells = (str(row), described, code(system.functions), code(system.modules), paper, code(cases.get(row, ())))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
