"""The readable kernel: all scores at once. It is the specification of the other kernels.

weights = masked softmax(modifier(score(query, key)), mask)
output  = dropout(weights) · value
"""

from jax.ad_checkpoint import checkpoint_name

from jattn.functional.captures import Captures
from jattn.functional.softmax import softmax_and_logsumexp
from jattn.kernels.arrays import heads_first, heads_last, hide, keys_seen, pool, queries_seen
from jattn.kernels.execute import execute, mesh_refusal
from jattn.kernels.grid import Grid
from jattn.kernels.scoring import Operands, Scoring, hoist_score, prepare
from jattn.request import Request, Result


def refuses(request: Request) -> str | None:
    """Why this kernel cannot do what is asked; None if it can."""
    return mesh_refusal(request)


def run(request: Request) -> Result:
    """Attention by this kernel."""
    run = _output_and_weights if request.return_weights else output
    return execute(run, *prepared(request), request)


def prepared(request: Request) -> tuple[Scoring, Operands]:
    """A request as one block."""
    *batch, T, N, _ = request.query.shape
    S = request.key.shape[-3]
    captures = Captures(request.names, request.mesh)
    grid = Grid(tuple(batch), N, T, S, rows=T, columns=S, examples=None)
    score = hoist_score(request, grid, captures)
    return prepare(request, grid, score, captures)


def output(scoring: Scoring, operands: Operands) -> Result:
    """Output and log-sum-exp."""
    return _output_and_weights(scoring, operands)._replace(weights=None)


def _output_and_weights(scoring: Scoring, operands: Operands) -> Result:
    at = (operands.first,) * 4  # 0, 0, 0, 0: there is one block
    captured = operands.captured
    query, key, value = map(heads_first, operands[:3])
    allowed = scoring.allowed(captured, *at) if scoring.is_masked else None
    with scoring.at_precision():
        scores = scoring.scores(captured, query, key, operands.biases, allowed, *at)
        weights, lse = softmax_and_logsumexp(scores, allowed)
        dropped = scoring.dropped(operands.dropout, weights, *at)
        output = pool(dropped, hide(value, keys_seen(allowed, value.shape[-3])))
    output = hide(output, queries_seen(allowed))  # already zeros; this stops a NaN cotangent
    output = checkpoint_name(heads_last(output).astype(value.dtype), "attend_output")
    lse = checkpoint_name(heads_last(lse[..., None])[..., 0], "attend_lse")
    return Result(output, lse, weights)
