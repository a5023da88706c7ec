"""While a model trains: optax transformations that prune, and what goes around them.

`prune`, `splice` and `keep_params_sparse` land every update on exact zero; `penalties` let weights grow small first;
`adapters` are two small factors trained in a weight's place, whose product keeps its zeros. `inner` is what the
optimizer inside of `prune` sees. `sparse_steps` train compressed params while masks move. `loops` go around whole
trainings, `presets` name the published compositions. What computes masks is below, in `methods`; nothing here traces a
model or looks at its architecture.
"""

from jaxprune.training.adapters import Adapter, adapted, init_adapters
from jaxprune.training.dropout import adjusted_dropout
from jaxprune.training.loops import IterativeResult, Round
from jaxprune.training.penalties import group_lasso, growing_penalty, l1
from jaxprune.training.presets import Preset
from jaxprune.training.regrowth import regrow_masks
from jaxprune.training.sparse_steps import SparseState, SparseSteps

__all__ = [
    "Adapter",
    "IterativeResult",
    "Preset",
    "Round",
    "SparseState",
    "SparseSteps",
    "adapted",
    "adjusted_dropout",
    "group_lasso",
    "growing_penalty",
    "init_adapters",
    "l1",
    "regrow_masks",
]
