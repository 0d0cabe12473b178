"""Mixture of experts: `route` decides, `dispatch` gathers, `experts` compute, `combine` sums; `forward` is these three.

routing = pyext.moe.route(logits, top_k=2, renormalize=True)
out = pyext.moe.forward(x, routing, w_gate_up, w_down)
loss = ... + 0.01 * routing.balance_loss + 0.001 * routing.z_loss
"""

from ._primitives import Routing as Routing
from .ops.moe_dispatch import combine as combine
from .ops.moe_dispatch import dispatch as dispatch
from .ops.moe_experts import experts as experts
from .ops.moe_experts import forward as forward
from .ops.moe_experts import grouped_linear as grouped_linear
from .ops.moe_route import route as route
