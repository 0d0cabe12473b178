"""Work shared between processes by `torch.distributed`.

q, k, v = (pyext.distributed.shard_sequence(x) for x in (q, k, v))  # or made from a sharded x in the first place
out = pyext.distributed.context_parallel_attention(q, k, v, is_causal=True)  # sharded likewise
"""

from .ops.context_parallel import context_parallel_attention as context_parallel_attention
from .ops.context_parallel import shard_sequence as shard_sequence
